"""Language models: where they come from, what they read, what their layers hold."""
