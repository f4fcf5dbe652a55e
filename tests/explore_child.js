// What a page of `nash_lab explore` computes, asked by test_explore.py: node explore_child.js QUESTIONS.json
const fs = require("fs");
const vm = require("vm");

function open(page) {
  const html = fs.readFileSync(page, "utf8");
  const [data, forward] = [...html.matchAll(/<script[^>]*>(.*?)<\/script>/gs)].map((match) => match[1]);
  const names = "({ Tokenizer, Model, Reading, sinkhorn })";
  return { data: JSON.parse(data), ...vm.runInThisContext(`(() => { ${forward}; return ${names}; })()`) };
}

async function answer({ page, ids, texts, switches }) {
  const { data, Tokenizer, Model, Reading } = open(page);
  const model = await Model.load(data);
  const tokenizer = new Tokenizer(data.pieces);
  const read = (changes, ids) => {
    const reading = new Reading(model, { ...model.switches(), ...changes });
    for (const id of ids) reading.read(id);
    return reading;
  };
  const rows = (reading) => reading.logits.map((row) => [...row]);
  const found = switches.map((changes) => rows(read(changes, ids)));

  // a text that changes in the middle: what it has in common with the last one is kept
  const reading = read({}, [...ids.slice(0, 5), 270, 271, 272]);
  reading.keep(ids);
  const kept = reading.ids.length;
  for (const id of ids.slice(kept)) reading.read(id);

  const quiet = read({ silent: model.switches().silent.map((_, stream) => stream === 0) }, ids);
  return {
    front: data.front,
    logits: found,
    losses: read({}, ids).losses,
    kept,
    again: rows(reading),
    silenced: quiet.levels.map((levels) => levels.map((streams) => streams[0])),
    encoded: texts.map((text) => tokenizer.encode(text)),
    decoded: texts.map((text) => tokenizer.decode(tokenizer.encode(text))),
    maps: read({}, ids).maps.at(-1),
    product: read({}, ids).products(ids.length - 1).at(-1),
    greedy: read({}, ids).next(0, data.forbidden),
    drawn: [0, 0.5, 0.999999999].map((share) => read({}, ids).next(0.7, data.forbidden, () => share)),
  };
}

(async () => {
  const questions = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
  const answers = [];
  for (const question of questions) answers.push(await answer(question));
  console.log(JSON.stringify(answers));
})();
