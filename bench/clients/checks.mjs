// checks.py for node: the same questions, the same loop.
export const URL = process.argv[2] ?? "http://127.0.0.1:8080";
export const SORT = "Sort these numbers: 42, 7, 19";
export const SORTED = "7, 19, 42";
export const PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo.";
export const ANNA = { name: "Anna", age: 31, city: "Oslo" };
export const ASKED = "What is the weather in Oslo?";
export const SUNNY = "The weather in Oslo is sunny.";
export const PERSON_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" }, city: { type: "string" } },
  required: ["name", "age", "city"],
  additionalProperties: false,
};
export const WEATHER = {
  name: "get_weather",
  description: "Get the weather of a city.",
  parameters: {
    type: "object",
    properties: { city: { type: "string", description: "The city." } },
    required: ["city"],
  },
};
const TRIES = 3;

export function same(said, wanted) {
  if (JSON.stringify(said) !== JSON.stringify(wanted)) {
    throw new Error(`${JSON.stringify(said)} instead of ${JSON.stringify(wanted)}`);
  }
}

export async function run(checks) {
  const results = {};
  for (const [name, check] of Object.entries(checks)) {
    const told = name.replaceAll("_", " ");
    for (let i = 0; i < TRIES && results[told] !== ""; i++) {
      try {
        await check();
        results[told] = "";
      } catch (error) {
        results[told] = `${error.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 300);
        if (error.status >= 400) break;
      }
    }
  }
  console.log(JSON.stringify(results));
}
