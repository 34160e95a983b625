// A black-box attack in the manner of Square Attack (Andriushchenko et al. 2020, linf): random search over squares, from
// the scores of the model alone. One square is tried a step, and kept when it lowers the margin. Our own, plain version:
// what it finds is an adversarial image; that it finds none proves nothing.

/** A seeded source of uniform numbers in [0, 1): the same seed, the same attack. */
export function uniform(seed) {
  // A xorshift of 32 bits (Marsaglia 2003); the first numbers of small seeds are alike, hence the warm-up.
  let state = (seed ^ 0x9e3779b9) | 0 || 1;
  const next = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 16; i++) next();
  return next;
}

/** How far the score of a class is above the best other one: negative when the model takes the image for another. */
export function margin(scores, label) {
  let other = -Infinity;
  scores.forEach((score, k) => {
    if (k !== label && score > other) other = score;
  });
  return scores[label] - other;
}

/** The side of the square, which shrinks as the queries are spent: the paper's schedule, scaled to the budget. */
export function sideAt(step, budget, area) {
  const passed = [10, 50, 200, 1000, 2000, 4000, 6000, 8000].filter((at) => (step / budget) * 10000 > at).length;
  return Math.max(1, Math.round(Math.sqrt(area * 0.8 * 0.5 ** passed)));
}

/**
 * Attack one image; yields after every query, so that its caller can show it, and stop it.
 *
 * @param {object} task
 * @param {(image: Float32Array) => Promise<ArrayLike<number>>} task.scores  the model: an image to its logits
 * @param {Float32Array} task.image   channels first, values in [0, 1]
 * @param {number[]} task.shape       [channels, height, width]
 * @param {number} task.label         the class that the model shall lose
 * @param {number} task.eps           largest change of a value
 * @param {number} task.budget        queries
 * @param {() => number} task.random  uniform in [0, 1)
 * @yields {{image: Float32Array, scores: ArrayLike<number>, margin: number, queries: number, found: boolean}} the best
 *   image so far
 */
export async function* attack({ scores, image, shape, label, eps, budget, random }) {
  const [channels, height, width] = shape;
  const changed = (at, sign) => Math.min(1, Math.max(0, image[at] + sign * eps));
  const sign = () => (random() < 0.5 ? -1 : 1);

  let best = Float32Array.from(image);
  for (let c = 0; c < channels; c++) {
    for (let x = 0; x < width; x++) {
      const stripe = sign();
      for (let y = 0; y < height; y++) best[(c * height + y) * width + x] = changed((c * height + y) * width + x, stripe);
    }
  }
  let said = await scores(best);
  let lowest = margin(said, label);
  yield { image: best, scores: said, margin: lowest, queries: 1, found: lowest < 0 };

  for (let queries = 2; queries <= budget && lowest >= 0; queries++) {
    const side = Math.min(sideAt(queries, budget, height * width), height, width);
    const top = Math.floor(random() * (height - side + 1));
    const left = Math.floor(random() * (width - side + 1));
    const trial = Float32Array.from(best);
    for (let c = 0; c < channels; c++) {
      const same = sign();
      for (let y = top; y < top + side; y++) {
        for (let x = left; x < left + side; x++) {
          trial[(c * height + y) * width + x] = changed((c * height + y) * width + x, same);
        }
      }
    }
    const heard = await scores(trial);
    const now = margin(heard, label);
    if (now < lowest) [best, said, lowest] = [trial, heard, now];
    yield { image: best, scores: said, margin: lowest, queries, found: lowest < 0 };
  }
}
