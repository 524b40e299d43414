// Frames of sliders are dots, drawn on white. On a dark page each is repainted by the rule of press/night.py: a colour
// keeps its hue, and stands out from the dark paper as it does from white, so that a method has one colour in all figures.
(() => {
  const page = document.documentElement;
  const made = new Map(); // a frame by day -> the same by night
  const PAPER = 0x12 / 255;

  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = (r, g, b) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const lit = (r, g, b) => {
    // HLS: a function from a lightness to the colour of this hue and saturation
    const most = Math.max(r, g, b), least = Math.min(r, g, b), spread = most - least, middle = (most + least) / 2;
    const saturation = spread ? spread / (1 - Math.abs(2 * middle - 1)) : 0;
    const turn = !spread ? 0 : most === r ? ((g - b) / spread + 6) % 6 : most === g ? (b - r) / spread + 2 : (r - g) / spread + 4;
    return (lightness) => {
      const chroma = (1 - Math.abs(2 * lightness - 1)) * saturation;
      const part = (n) => {
        const k = (n + 2 * turn) % 12;
        return lightness - (chroma / 2) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
      };
      return [part(0), part(8), part(4)];
    };
  };
  const byNight = (r, g, b) => {
    const colour = lit(r, g, b);
    const wanted = 1.05 / (luminance(r, g, b) + 0.05);
    let low = 0, high = 1;
    for (let i = 0; i < 12; i++) {
      const middle = (low + high) / 2;
      const light = (luminance(...colour(middle)) + 0.05) / (luminance(PAPER, PAPER, PAPER) + 0.05);
      [low, high] = light > wanted ? [low, middle] : [middle, high];
    }
    return colour(high);
  };

  const known = new Map(); // colours met so far, as the four bytes of a pixel
  const repaint = async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const dots = pen.getImageData(0, 0, image.width, image.height);
    const bytes = dots.data, pixels = new Uint32Array(bytes.buffer);
    for (let i = 0; i < pixels.length; i++) {
      let colour = known.get(pixels[i]);
      if (colour === undefined) {
        const [r, g, b] = byNight(bytes[4 * i] / 255, bytes[4 * i + 1] / 255, bytes[4 * i + 2] / 255);
        const four = new Uint8ClampedArray([255 * r, 255 * g, 255 * b, 255]);
        colour = new Uint32Array(four.buffer)[0];
        known.set(pixels[i], colour);
      }
      pixels[i] = colour;
    }
    pen.putImageData(dots, 0, 0);
    return canvas.toDataURL();
  };

  const isDay = (source) => source.startsWith("data:image/webp");
  const show = (image) => {
    if (isDay(image.src)) image.day = image.src;
    const dark = page.dataset.theme === "dark", night = made.get(image.day);
    image.toggleAttribute("data-waits", dark && !night);
    if (dark !== isDay(image.src) || (dark && night === image.src)) return;
    if (!dark) image.src = image.day;
    else if (night) image.src = night;
    else {
      const day = image.day;
      const painted = repaint(day).catch(() => day); // a browser that lets no page read a picture shows it as it is
      painted.then((source) => (made.set(day, source), show(image)));
    }
  };
  const images = [...document.querySelectorAll(".book-slider img")];
  const watch = (target, name, then) =>
    new MutationObserver(then).observe(target, { attributes: true, attributeFilter: [name] });
  for (const image of images) {
    watch(image, "src", () => show(image)); // before the browser paints
    show(image);
  }
  watch(page, "data-theme", () => images.forEach(show));
})();
