// Uses the page as a reader does, in a headless Chromium that comes with an npm package, and prints what it saw.
//
//     node check_page.mjs URL [SCREENSHOT]

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [url, screenshot] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  args: chromium.args,
  headless: "shell",
});
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1000, height: 760 });
  const errors = [];
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  const foreign = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && /^https?:/.test(request.url())) foreign.push(request.url());
  });
  const status = () => page.$eval("#status", (node) => node.textContent);
  const settled = async (pattern) => {
    await page.waitForFunction((text) => new RegExp(text).test(document.querySelector("#status").textContent), {}, pattern);
    return status();
  };
  const top = (id) => page.$$eval(`#${id} li`, (rows) => rows.map((row) => row.innerText.split("\n")));
  // The picture as it is on the screen, red channel.
  const painted = (id) =>
    page.$eval(`#${id}`, (canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return Array.from(data).filter((_, i) => i % 4 === 0);
    });

  await page.goto(url);
  await settled("^The model says");
  const seen = { samples: [], attacks: [] };
  for (const button of await page.$$("#samples button")) {
    await button.click();
    await page.waitForFunction((pressed) => pressed.getAttribute("aria-pressed") === "true", {}, button);
    await page.waitForFunction(() => !document.querySelector("#attack").disabled);
    const alt = await button.$eval("img", (node) => node.alt);
    seen.samples.push({ label: alt, top: await top("scores-before") });
  }
  const models = await page.$$eval("#model option", (options) => options.map((option) => option.value));
  for (const model of models) {
    await page.select("#model", model);
    await settled("^The model says");
    for (const eps of [0, 4, 64]) {
      await page.$eval("#eps", (node, value) => (node.value = value), eps);
      await page.$eval("#eps", (node) => node.dispatchEvent(new Event("input")));
      await page.select("#budget", "200");
      await page.click("#attack");
      const said = await settled("^(Taken|Still)");
      const [before, after] = [await painted("before"), await painted("after")];
      const change = Math.max(...before.map((value, i) => Math.abs(value - after[i])));
      seen.attacks.push({ model, eps, said, change, after: await top("scores-after") });
    }
  }
  if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });

  await page.select("#budget", "5000");
  await page.$eval("#eps", (node) => (node.value = 0));
  await page.click("#attack");
  await settled("^Attacking");
  await page.click("#stop");
  seen.stopped = await settled("^(Taken|Still)");
  await page.click("#attack"); // and a picture chosen meanwhile ends it
  await settled("^Attacking");
  await (await page.$("#samples button")).click();
  seen.left = await settled("^The model says");
  await new Promise((done) => setTimeout(done, 500));
  seen.later = await status();
  await page.select("#model", models.at(0)); // a picture chosen while a model loads must not lose the model
  await (await page.$("#samples button:nth-child(2)")).click();
  await settled("^The model says");
  seen.reloaded = await page.$eval("#attack", (button) => !button.disabled);
  console.log(JSON.stringify({ ...seen, errors, foreign, browser: await browser.version() }));
} finally {
  await browser.close();
}
