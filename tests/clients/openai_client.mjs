// Uses OpenAI's own client for Node.

import assert from "node:assert/strict";

import OpenAI from "openai";

const { MODERATORD_URL: url, MODERATORD_TOKEN: token } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 });

const one = await client.moderations.create({ input: "see you at the garden" });
const [result] = one.results;
assert.ok(result.category_scores.hate >= 0 && result.category_scores.hate <= 1);
assert.equal(result.category_scores.hate, result.decision.probability);
console.log("moderations.create in Node:", one.id, result.flagged, result.category_scores.hate);

const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(wrong.moderations.create({ input: "a hat" }), OpenAI.AuthenticationError);
