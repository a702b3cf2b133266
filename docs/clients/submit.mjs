// Send a payload, and print the id of its job. usage: node submit.mjs '{"data": [3, 1, 4]}'
import { randomUUID } from "node:crypto";

const url = process.env.POSTBACK ?? "http://127.0.0.1:8080";
const answer = await fetch(`${url}/process`, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",
    Authorization: `Bearer ${process.env.API_TOKEN ?? ""}`,
    "Idempotency-Key": randomUUID(), // the same one if you send it again
  },
  body: process.argv[2],
  signal: AbortSignal.timeout(10_000),
});
const document = await answer.json();
if (!answer.ok) {
  console.error(document.detail);
  process.exit(1);
}
console.log(document.id);
