import asyncio
import json

import nats


async def main() -> None:
    client = await nats.connect("nats://127.0.0.1:4222")
    answers = await client.subscribe(inbox := client.new_inbox())
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is 47 + 85?"}], "temperature": 0}
    await client.publish("moecule.v1.generate", json.dumps(body).encode(), reply=inbox)
    async for message in answers.messages:
        answer = json.loads(message.data)
        print(answer.get("reasoning") or answer.get("text") or answer.get("error") or "", end="", flush=True)
        if answer["type"] in ("end", "error"):
            break
    await client.close()


asyncio.run(main())
