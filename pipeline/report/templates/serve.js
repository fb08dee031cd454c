"use strict";
// Builds of the output, asked for again and again. Text is set as text, never as HTML.
const EVERY_MS = 5000;
const holder = document.getElementById("builds");

const paragraph = (text, kind) => {
  const made = document.createElement("p");
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
};

const running = (build) => {
  const bar = document.createElement("progress");
  bar.max = build.shards_total || 1;
  bar.value = build.shards_done;
  bar.setAttribute("aria-label", `Build ${build.build}`);
  const left = build.eta_s == null ? "" : `, about ${Math.ceil(build.eta_s / 60).toLocaleString("en")} minutes left`;
  const rate = build.frames_per_s == null ? "" : `, ${build.frames_per_s.toFixed(1)} frames/s`;
  const encoders = build.encoders && build.encoders.num ? `, ${build.encoders.num} encoders` : "";
  return [paragraph(`Build ${build.build}: ${build.shards_done} of ${build.shards_total} shards${rate}${encoders}${left}`), bar];
};

const shown = (status) => {
  const builds = [status.progress, ...status.other_builds].filter(Boolean);
  const lines = builds.flatMap(running);
  for (const build of status.dead_builds) {
    lines.push(paragraph(`Build ${build.build} stopped reporting: it was killed, or its machine was lost. The same command resumes.`, "warn"));
  }
  const last = status.last_run;
  if (!builds.length && last) {
    const ended = last.ended;
    lines.push(paragraph(ended ? `No build runs. The last one, ${last.build}, ended at ${ended.ts.slice(0, 19).replace("T", " ")} UTC: ${ended.outcome}.`
      : `No build runs. The last one, ${last.build}, left no end in its log.`));
  }
  return lines.length ? lines : [paragraph("No build runs.")];
};

let before = "";
const look = async () => {
  let text;
  try {
    const answer = await fetch("progress.json");
    text = await answer.text();
    if (!answer.ok) throw new Error(text);
    if (text !== before) holder.replaceChildren(...shown(JSON.parse(text)));
  } catch (error) {
    text = "";
    holder.replaceChildren(paragraph(`The progress cannot be read: ${error.message}`, "bad"));
  }
  before = text;
  setTimeout(look, EVERY_MS);
};
look();
