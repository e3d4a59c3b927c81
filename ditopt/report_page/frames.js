// Dense and optimized frames, their difference, and both in one picture with a movable border.

async function framesSection(data) {
  const load = (source) => new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a picture of the report cannot be decoded"));
    image.src = source;
  });
  const sheets = await Promise.all([load(data.dense), load(data.optimized)]);
  const { width, height } = data;

  /** Pixels of one frame of a sheet, in which frames stand below each other. */
  function pixels(sheet, frame) {
    const canvas = make("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(sheet, 0, -frame * height);
    return context.getImageData(0, 0, width, height);
  }

  const canvases = ["frame-dense", "frame-optimized", "frame-difference", "frame-split"].map((id) => $(`#${id}`));
  for (const canvas of canvases) {
    Object.assign(canvas, { width, height });
    canvas.classList.toggle("smooth", width > 256);
  }
  const [number, gain, border] = ["#frame-number", "#frame-gain", "#frame-border"].map((id) => $(id));
  const put = (canvas, image) => canvas.getContext("2d").putImageData(image, 0, 0);

  function redraw() {
    const frame = Number(number.value);
    const [dense, optimized] = sheets.map((sheet) => pixels(sheet, frame));
    const difference = new ImageData(width, height);
    const split = new ImageData(width, height);
    const edge = Math.round((width * Number(border.value)) / 100);
    for (let i = 0; i < dense.data.length; i += 4) {
      const source = (i / 4) % width < edge ? dense : optimized;
      for (let channel = 0; channel < 3; channel += 1) {
        difference.data[i + channel] = Number(gain.value) * Math.abs(dense.data[i + channel] - optimized.data[i + channel]);
        split.data[i + channel] = source.data[i + channel];
      }
      difference.data[i + 3] = split.data[i + 3] = 255;
    }
    if (edge > 0 && edge < width) {
      for (let row = 0; row < height; row += 1) split.data.set([255, 255, 255, 255], 4 * (row * width + edge));
    }
    [dense, optimized, difference, split].forEach((image, index) => put(canvases[index], image));
    $("#frame-number-value").textContent = `${data.numbers[frame] + 1} of ${data.total}`;
    $("#frame-gain-value").textContent = `× ${gain.value}`;
    $("#frame-border-value").textContent = `${border.value}%`;
    number.ariaValueText = `frame ${data.numbers[frame] + 1} of ${data.total}`;
    gain.ariaValueText = `${gain.value} times`;
  }
  for (const slider of [number, gain, border]) slider.addEventListener("input", redraw);
  redraw();
}

if (DATA.frames) framesSection(DATA.frames);
themed();
