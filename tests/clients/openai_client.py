"""Uses OpenAI's own client for Python."""

import os

import openai

URL, TOKEN = os.environ["MODERATORD_URL"], os.environ["MODERATORD_TOKEN"]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=TOKEN, max_retries=0)

one = client.moderations.create(input="see you at the garden", model="omni-moderation-latest")
result = one.results[0]
assert 0 <= result.category_scores.hate <= 1 and result.categories.hate == result.flagged, one
assert result.category_scores.hate == result.model_extra["decision"]["probability"], one
print("moderations.create:", one.id, one.model, result.flagged, result.category_scores.hate)

# A text in another language is flagged for a person to look at, but it is not called hateful.
german = client.moderations.create(input="Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut.").results[0]
assert german.flagged and not german.categories.hate, german
assert german.model_extra["decision"]["competence"] == "out_of_scope", german

many = client.moderations.create(input=["see you at the garden", "a lovely hat"])
assert [r.category_scores.hate for r in many.results][0] == result.category_scores.hate, many
parts = client.moderations.create(input=[{"type": "text", "text": "see you at the garden"}])
assert parts.results[0].category_scores.hate == result.category_scores.hate, parts

try:
    client.moderations.create(input=[{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])
    raise AssertionError("an image was accepted")
except openai.BadRequestError as raised:
    assert raised.param == "input[0].image_url", raised
    print("moderations.create:", raised.status_code, raised.message)
try:
    openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0).moderations.create(input="a hat")
    raise AssertionError("a wrong key was accepted")
except openai.AuthenticationError as raised:
    assert raised.code == "invalid_api_key", raised
    print("moderations.create:", raised.status_code, raised.code)
