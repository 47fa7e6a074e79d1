import asyncio
import json
import os

import nats

REQUEST = {"model": "tiny", "messages": [{"role": "user", "content": "What is 47 + 85?"}], "temperature": 0}


async def main() -> None:
    url = os.environ.get("MOECULE_NATS_URL", "nats://127.0.0.1:4222")
    async with await nats.connect(url, max_reconnect_attempts=3) as client:  # an error, not waiting
        answers = await client.subscribe(inbox := client.new_inbox())
        await client.publish("moecule.v1.generate", json.dumps(REQUEST).encode(), reply=inbox)
        async for message in answers.messages:
            answer = json.loads(message.data)
            print(answer.get("reasoning") or answer.get("text") or answer.get("error") or "", end="", flush=True)
            if answer["type"] in ("end", "error"):
                break


asyncio.run(main())
