// The openai package for node: chat, stream, structured output, tools, responses.
import OpenAI from "openai";
import { ANNA, ASKED, PERSON, PERSON_SCHEMA, SORT, SORTED, SUNNY, URL, WEATHER, run, same } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const model = "default";
const said = (text) => [{ role: "user", content: text }];

await run({
  async chat() {
    const answer = await client.chat.completions.create({ model, messages: said(SORT) });
    same(answer.choices[0].message.content, SORTED);
    for await (const one of client.models.list()) same(typeof one.id, "string");
  },
  async stream() {
    const stream = client.chat.completions.stream({ model, messages: said(SORT) });
    same(await stream.finalContent(), SORTED);
  },
  async structured() {
    const form = { type: "json_schema", json_schema: { name: "person", schema: PERSON_SCHEMA, strict: true } };
    const answer = await client.chat.completions.parse({ model, messages: said(PERSON), response_format: form });
    same(JSON.parse(answer.choices[0].message.content), ANNA);
  },
  async tools() {
    const tool = { type: "function", function: { ...WEATHER, function: () => "sunny", parse: JSON.parse } };
    const runner = client.chat.completions.runTools({ model, messages: said(ASKED), tools: [tool] });
    same(await runner.finalContent(), SUNNY);
  },
  async responses() {
    same((await client.responses.create({ model, input: SORT })).output_text, SORTED);
    const final = await client.responses.stream({ model, input: SORT }).finalResponse();
    same(final.output_text, SORTED);
  },
});
