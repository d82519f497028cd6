"""Step 4: writes the weighted mean of the weights of two models, and prints its figures of the development part.

    python blend.py CORPORA FIRST TAUGHT SECOND SHARE OUT

SHARE is the weight of SECOND, which refine.py made from FIRST, and TAUGHT the file with the probabilities of FIRST. The
mean keeps more of what FIRST knew than SECOND does (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
"""

import sys
from pathlib import Path

from refine import Data, Model, development, write


def main(corpora, first, taught, second, share, out):
    model, share = Model(first), float(share)
    data = Data(corpora, model, Path(taught), 1)
    refined = Model(second).network.state_dict()
    for name, value in model.network.state_dict().items():
        value.lerp_(refined[name], share).copy_(value.bfloat16())
    development(model, data)
    write(model, Path(first), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
