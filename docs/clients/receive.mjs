// Receive postbacks: verify, drop duplicates, answer.
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.POSTBACK_SECRET);
const seen = new Set(); // in production: a table with the webhook-id as its key

async function take(request, response) {
  const chunks = [];
  let event;
  try {
    for await (const chunk of request) chunks.push(chunk); // throws when the sender hangs up
    event = webhook.verify(Buffer.concat(chunks).toString(), request.headers);
  } catch {
    response.writeHead(401).end();
    return;
  }
  const id = request.headers["webhook-id"];
  if (!seen.has(id)) console.log(event.type, event.data.id);
  seen.add(id);
  response.writeHead(204).end();
}

createServer(take).listen(Number(process.env.PORT ?? 8081), "127.0.0.1");
