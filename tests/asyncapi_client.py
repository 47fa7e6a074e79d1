"""A service written from the AsyncAPI document alone: it is given the NATS server and the document, and imports nothing
of this repository. `python tests/asyncapi_client.py URL DOCUMENT JOB` prints one JSON object a line."""

import asyncio
import json
import sys

import jsonschema
import nats


class Door:
    """Addresses and schemas come from the document, by the names of its operations and messages."""

    def __init__(self, document, client):
        self.document, self.client = document, client

    def channel(self, operation):
        return self.follow(self.document["operations"][operation]["channel"])

    def follow(self, ref):
        node = self.document
        for word in ref["$ref"].removeprefix("#/").split("/"):
            node = node[word]
        return node

    def example(self, channel, message):
        return dict(self.follow(channel["messages"][message])["examples"][0]["payload"])

    def check(self, operation, data):
        """That an answer is one of those the document promises, and which."""
        replies = self.follow(self.document["operations"][operation]["reply"]["channel"])["messages"]
        fits = [name for name, ref in replies.items() if self.valid(data, self.follow(ref)["payload"])]
        assert len(fits) == 1, (fits, data)
        return fits[0]

    def valid(self, data, schema):
        whole = {**schema, "components": self.document["components"]}
        return jsonschema.Draft202012Validator(whole).is_valid(data)

    async def ask(self, body):
        inbox = self.client.new_inbox()
        answers = await self.client.subscribe(inbox)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.client.publish(self.channel("generate")["address"], data, reply=inbox)
        async for message in answers.messages:
            answer = json.loads(message.data)
            answer["is"] = self.check("generate", json.loads(message.data))
            answer["headers"] = message.headers
            yield answer
            if answer["type"] in ("end", "error"):
                await answers.unsubscribe()
                return


def tell(**fields):
    print(json.dumps(fields), flush=True)


async def generate(door):
    """Every kind of request that the document has an example of."""
    channel = door.channel("generate")
    for name in channel["messages"]:
        text, tokens, seqs, last = "", 0, [], {}
        async for last in door.ask(door.example(channel, name)):
            seqs.append(last["seq"])
            text += last.get("reasoning", "") + last.get("text", "")
            tokens += len(last.get("tokens", []))
        whole = seqs == list(range(len(seqs))) and tokens == last["usage"]["completion_tokens"]
        tell(name=name, text=text, last=last["is"], whole=whole)


async def cancel(door):
    async for answer in door.ask(STORY | {"model": model(door)}):
        if answer["is"] == "Batch":
            address = door.channel("cancel")["address"].format(request_id=answer["request_id"])
            reply = json.loads((await door.client.request(address)).data)
            tell(cancelled=door.check("cancel", reply))
            break
    async for answer in door.ask(STORY | {"model": model(door)}):
        if answer["is"] == "Accepted":
            await door.client.publish(answer["cancel"])
        if answer["is"] == "Refused":
            tell(code=answer["error"]["code"])
    reply = json.loads((await door.client.request(address)).data)
    tell(again=reply["error"]["code"], told=door.check("cancel", reply))


async def errors(door):
    own = model(door)
    for body in (
        b"no JSON",
        {"prompt": "a"},
        {"model": "another", "prompt": "a"},
        {"model": own, "prompt": "a", "temperature": "hot"},
        {"model": own, "prompt": "a", "tokens": [1]},
        {"model": own, "tokens": [5] * 10_000},
        {"model": own, "messages": [{"role": "user", "content": {"deep": []}}]},
    ):
        async for answer in door.ask(body):
            error, headers = answer["error"], answer["headers"]
            same = headers["Nats-Service-Error-Code"] == error["code"] and bool(headers["Nats-Service-Error"])
            tell(code=error["code"], param=error["param"], same=same)


async def models(door):
    reply = json.loads((await door.client.request(door.channel("models")["address"])).data)
    tell(models=[model["id"] for model in reply["data"]], told=door.check("models", reply))


async def stream(door):
    """Goes on until it is killed."""
    async for answer in door.ask(STORY | {"model": model(door)}):
        tell(type=answer["type"], request=answer["request_id"])


STORY = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}


def model(door):
    return door.document["components"]["schemas"]["TextRequest"]["properties"]["model"]["enum"][0]


JOBS = {"generate": generate, "cancel": cancel, "errors": errors, "models": models, "stream": stream}


async def main(url, document, job):
    client = await nats.connect(url)
    try:
        await job(Door(document, client))
    finally:
        await client.close()


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        asyncio.run(main(sys.argv[1], json.load(file), JOBS[sys.argv[3]]))
