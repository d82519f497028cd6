"""Uses Google's own API client with the discovery document that the service serves."""

import os

from googleapiclient import discovery
from googleapiclient.errors import HttpError

URL, TOKEN = os.environ["MODERATORD_URL"], os.environ["MODERATORD_TOKEN"]
TEXT = "See you at the garden. Bring a hat!"


def client(key):
    return discovery.build(
        "commentanalyzer",
        "v1alpha1",
        developerKey=key,
        discoveryServiceUrl=f"{URL}/$discovery/rest?version=v1alpha1",
        static_discovery=False,
    )


def analyze(body, key=TOKEN):
    return client(key).comments().analyze(body=body).execute()


def error(body, key=TOKEN):
    """Returns the status and the text of the error that the client raises."""
    try:
        analyze(body, key)
    except HttpError as raised:
        return raised.status_code, str(raised)
    raise AssertionError(f"{body} was accepted")


answer = analyze(
    {
        "comment": {"text": TEXT},
        "requestedAttributes": {"IDENTITY_ATTACK": {}},
        "languages": ["en"],
        "doNotStore": True,
        "spanAnnotations": True,
        "clientToken": "c-1",
    }
)
scores = answer["attributeScores"]["IDENTITY_ATTACK"]
assert 0 <= scores["summaryScore"]["value"] <= 1 and scores["summaryScore"]["type"] == "PROBABILITY", answer
assert [TEXT[span["begin"] : span["end"]] for span in scores["spanScores"]] == ["See you at the garden.", "Bring a hat!"]
assert answer["clientToken"] == "c-1" and answer["languages"] == ["en"], answer
print("comments.analyze:", scores)

GERMAN = {"text": "Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut."}
ATTRIBUTES = {"IDENTITY_ATTACK": {}}
for body, key, expected in [
    ({"comment": GERMAN, "requestedAttributes": ATTRIBUTES}, TOKEN, "does not support request languages: de"),
    ({"comment": GERMAN, "requestedAttributes": ATTRIBUTES, "languages": ["en"]}, TOKEN, "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"),
    ({"comment": {"text": TEXT}, "requestedAttributes": ATTRIBUTES, "languages": ["fr"]}, TOKEN, "languages: fr"),
    ({"comment": {"text": TEXT}, "requestedAttributes": {"TOXICITY": {}}}, TOKEN, "Unknown requested attribute: TOXICITY"),
    ({"comment": {"text": ""}, "requestedAttributes": {"IDENTITY_ATTACK": {}}}, TOKEN, "COMMENT_EMPTY"),
    ({"comment": {"text": TEXT}}, TOKEN, "NO_REQUESTED_ATTRIBUTES"),
    ({"comment": {"text": TEXT}, "requestedAttributes": {"IDENTITY_ATTACK": {}}}, "wrong", "API key not valid"),
]:
    status, text = error(body, key)
    assert status == 400 and expected in text, (status, text)
    print("comments.analyze:", status, expected)
dropped = analyze({"comment": GERMAN, "requestedAttributes": ATTRIBUTES, "dropUnsupportedAttributes": True})
assert dropped["attributeScores"] == {} and dropped["detectedLanguages"] == ["de"], dropped

suggestion = {"comment": {"text": TEXT}, "attributeScores": {"IDENTITY_ATTACK": {"summaryScore": {"value": 0}}}}
try:
    client(TOKEN).comments().suggestscore(body=suggestion).execute()
    raise AssertionError("a suggestion was accepted without a topic for it")
except HttpError as raised:
    assert raised.status_code == 400 and "topics.feedback" in str(raised), raised
    print("comments.suggestscore:", raised.status_code, "no topic for suggestions")
