"""Checks the description of the API, and real requests and answers against it."""

import json
import os
import urllib.request

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

URL, TOKEN = os.environ["MODERATORD_URL"], os.environ["MODERATORD_TOKEN"]


def fetch(path, body=None):
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers)) as answer:
        return json.load(answer)


document = fetch("/openapi.json")
validate(document)


def is_described(value, content):
    schema = content["application/json"]["schema"]
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


TEXT = "see you at the garden"
asked = {"requestedAttributes": {"IDENTITY_ATTACK": {}}, "comment": {"text": TEXT}, "spanAnnotations": True}
for path, body in [
    ("/v1/score", {"content_id": 1, "text": TEXT, "community_id": "garden"}),
    ("/v1/score", [{"text": TEXT}, {"content_id": "c", "op": "delete"}]),
    ("/v1/moderations", {"input": TEXT}),
    ("/v1/moderations", {"input": [TEXT, "a hat"], "model": "omni-moderation-latest"}),
    ("/v1/moderations", {"input": [{"type": "text", "text": TEXT}]}),
    ("/v1alpha1/comments:analyze", asked),
]:
    method = document["paths"][path]["post"]
    is_described(body, method["requestBody"]["content"])
    answer = fetch(path, body)
    is_described(answer, method["responses"]["200"]["content"])
assert not Draft202012Validator(
    {"$ref": "#/components/schemas/Decision", "components": document["components"]}
).is_valid({"action": "perhaps"})
print("openapi.json:", document["openapi"], ", ".join(document["paths"]))
