"""The run-time checker of the tests; as PEP 484 has it, an int is good where a float is asked for."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
