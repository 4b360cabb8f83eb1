// The ollama package for node: chat, stream, generate, formats, tools.
import { Ollama } from "ollama";
import { ANNA, ASKED, PERSON, PERSON_SCHEMA, SORT, SORTED, SUNNY, URL, WEATHER, run, same } from "./checks.mjs";

const client = new Ollama({ host: URL });
const model = async () => (await client.list()).models[0].model;
const said = (text) => [{ role: "user", content: text }];

await run({
  async chat() {
    const answer = await client.chat({ model: await model(), messages: said(SORT) });
    same(answer.message.content, SORTED);
  },
  async stream() {
    let text = "";
    for await (const one of await client.chat({ model: await model(), messages: said(SORT), stream: true })) {
      text += one.message.content;
    }
    same(text, SORTED);
  },
  async generate() {
    same((await client.generate({ model: await model(), prompt: SORT })).response, SORTED);
  },
  async structured() {
    const answer = await client.chat({ model: await model(), messages: said(PERSON), format: PERSON_SCHEMA });
    same(JSON.parse(answer.message.content), ANNA);
  },
  async tools() {
    const request = { model: await model(), tools: [{ type: "function", function: WEATHER }] };
    const { message } = await client.chat({ ...request, messages: said(ASKED) });
    same(message.tool_calls?.map((one) => one.function.arguments), [{ city: "Oslo" }]);
    const turns = [...said(ASKED), message, { role: "tool", tool_name: "get_weather", content: "sunny" }];
    same((await client.chat({ ...request, messages: turns })).message.content, SUNNY);
  },
});
