// One exported file in onnxruntime-web: float32 [batch, 3, height, width] in [0, 1] to logits.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

// More threads need a page served with cross-origin isolation; a small network does not gain from them.
ort.env.wasm.numThreads = 1;

export class Model {
  /** Fetch and open a file; throws an Error with a sentence for the reader. */
  static async open(url) {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url} cannot be fetched (status ${response.status})`);
    const session = await ort.InferenceSession.create(new Uint8Array(await response.arrayBuffer()));
    const input = session.inputMetadata[0];
    const shape = input.shape ?? [];
    const sized = shape.length === 4 && shape[1] === 3 && shape.slice(2).every(Number.isInteger);
    if (input.type !== "float32" || !sized) {
      throw new Error(`${url} reads ${input.type} [${shape}]; the page needs float32 [batch, 3, height, width]`);
    }
    if (session.outputNames[0] !== "logits") throw new Error(`${url} gives ${session.outputNames[0]}, and not logits`);
    return new Model(session, shape.slice(1));
  }

  constructor(session, shape) {
    this.session = session;
    this.shape = shape; // [3, height, width]
  }

  /** The logits of one image. */
  async scores(image) {
    const tensor = new ort.Tensor("float32", image, [1, ...this.shape]);
    const { logits } = await this.session.run({ [this.session.inputNames[0]]: tensor });
    return logits.data;
  }
}

export function probabilities(scores) {
  const largest = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** The pixels of a picture, short side fitted and centre cropped: channels first, in [0, 1]. */
export function readPicture(picture, [channels, height, width]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = [picture.width * scale, picture.height * scale];
  context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  const pixels = context.getImageData(0, 0, width, height).data;
  const image = new Float32Array(channels * height * width);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < channels; c++) image[c * height * width + i] = pixels[4 * i + c] / 255;
  }
  return image;
}

/** Paint values in [0, 1], channels first, into a canvas. */
export function paint(canvas, image, [, height, width]) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round(255 * image[c * height * width + i]);
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
