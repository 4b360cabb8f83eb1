// The Anthropic package for node: messages, stream, tools, counted tokens.
import Anthropic from "@anthropic-ai/sdk";
import { ASKED, SORT, SORTED, SUNNY, URL, WEATHER, run, same } from "./checks.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const tools = [{ name: WEATHER.name, description: WEATHER.description, input_schema: WEATHER.parameters }];
const asked = (content) => ({ model: "default", max_tokens: 256, messages: [{ role: "user", content }] });

await run({
  async messages() {
    const answer = await client.messages.create(asked(SORT));
    same([answer.content[0].text, answer.stop_reason], [SORTED, "end_turn"]);
  },
  async stream() {
    same(await client.messages.stream(asked(SORT)).finalText(), SORTED);
  },
  async tools() {
    const request = { ...asked(ASKED), tools };
    const first = await client.messages.stream(request).finalMessage();
    const call = first.content.find((one) => one.type === "tool_use");
    same([call?.name, call?.input, first.stop_reason], ["get_weather", { city: "Oslo" }, "tool_use"]);
    const result = [{ type: "tool_result", tool_use_id: call.id, content: "sunny" }];
    const turns = [{ role: "assistant", content: first.content }, { role: "user", content: result }];
    const second = await client.messages.create({ ...request, messages: [...request.messages, ...turns] });
    same(second.content[0].text, SUNNY);
  },
  async count_tokens() {
    const { max_tokens, ...request } = asked(ASKED);
    same((await client.messages.countTokens(request)).input_tokens > 0, true);
  },
});
