"""The daemon's default frame (`[prompt]` in config/moderatord.toml), which the model is trained with."""

LABELS = ("Positive", "Negative")
HATEFUL = "Negative"
HEAD = "Classify the following text into one of the following classes:[Positive,Negative]<separator>Text:"
TAIL = "<separator>Prediction:"
