#!/usr/bin/env bash
# An engineer who has a trainer and wants one part of this one: the kernels, a loss, the scores, or
# a trained model inside of another program.
#
#     tests/walks/engineer.sh FOLDER      in a checkout, with its environment active
. "$(dirname "$0")/steps.sh"
mkdir -p "$1"
cd "$1"
checkout=$OLDPWD

# The kernels alone: a package of its own, without the trainer.
run python -m pip install --quiet --disable-pip-version-check --no-deps --target kernels "$checkout/kernels"
cat >losses.py <<'PY'
import sys

import torch
import torch.nn.functional as F

from flap_kernels import infonce
from flap_kernels.open_clip import ClipLoss

assert "flap_fast" not in sys.modules
torch.manual_seed(0)
audio = F.normalize(torch.randn(256, 128), dim=1).requires_grad_()
text = F.normalize(torch.randn(256, 128), dim=1).requires_grad_()
scale = torch.tensor(14.0, requires_grad=True)

logits = scale * audio @ text.T
pairs = torch.arange(256)
plain = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
wanted = torch.autograd.grad(plain, (audio, text, scale))
for name, loss in (
    ("infonce", infonce(audio, text, scale)),
    ("open_clip's ClipLoss", ClipLoss()(audio, text, scale)),
):
    found = torch.autograd.grad(loss, (audio, text, scale))
    gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted))
    print(f"{name}: {loss.item():.6f}, plain {plain.item():.6f}; gradients differ by {gap:.1e}")
    assert gap < 1e-5
PY
run env PYTHONPATH=kernels python losses.py

# The Python of a page's first block that says WORDS, into a file.
block() {
  python - "$1" "$2" <<'PY'
import re, sys
from pathlib import Path

blocks = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
print(next(block for block in blocks if sys.argv[2] in block))
PY
}

# A masked autoencoder of the kernels, and a trainer over two ranks, as their page has them.
block "$checkout/kernels/README.md" masked_mse >autoencoder.py
run env PYTHONPATH=kernels python autoencoder.py
block "$checkout/kernels/README.md" init_process_group >train.py
# A thread of gloo that waits for the GIL when Python ends aborts the process (PyTorch 2.14).
printf '\nimport time\ntime.sleep(0.2)\n' >>train.py
run env PYTHONPATH=kernels OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py
says "loss"

# The scores alone, of another model's embeddings.
block "$checkout/docs/evaluation.md" retrieval >scores.py
run python scores.py

# A trained model inside of a program that has samples, not files.
[ -e "$checkout/runs/demo/checkpoints" ] || (cd "$checkout" && run make demo)
cat >embed.py <<'PY'
import sys

import numpy as np
import soundfile

import flap_fast

model = flap_fast.load(sys.argv[1])
samples, rate = soundfile.read(sys.argv[2], dtype="float32")
rows = model.embed_audio([(samples, rate), sys.argv[2]])
print("samples and the file:", np.abs(rows[0] - rows[1]).max())
assert np.allclose(rows[0], rows[1], atol=1e-6)
print(model.rank((samples, rate), ["a choir sings", "a drum is hit"])[0])
PY
sound=$checkout/demo/audio/sonicpi_ambi_choir.ogg
run python embed.py "$checkout/runs/demo" "$sound"
says "choir"

# The same without PyTorch: onnxruntime and tokenizers.
run flap export "$checkout/runs/demo" portable --onnx
cat >portable.py <<'PY'
import sys

sys.path.insert(0, "portable")
from embed import Model

model = Model("portable", int8=True)
print(model.embed(sys.argv[1]) @ model.embed_text(["a choir sings", "a drum is hit"]).T)
assert not {"torch", "flap_fast"} & set(sys.modules)
PY
run python portable.py "$sound"

# What he gets wrong at first: one sentence each.
cat >wrong.py <<'PY'
import sys

import torch

import flap_fast
from flap_kernels import infonce

model = flap_fast.load(sys.argv[1])
for what, attempt in {
    "a batch of other widths": lambda: infonce(torch.zeros(4, 8), torch.zeros(4, 9), 14.0),
    "a file that is not there": lambda: model.embed_audio(["gone.wav"]),
    "16-bit samples as floats": lambda: model.embed_audio([(torch.ones(16000).numpy() * 9e3, 16000)]),
    "no rate": lambda: model.embed_audio([(torch.zeros(16000).numpy(), 0)]),
    "a string for a list": lambda: model.embed_text("a dog barks"),
}.items():
    try:
        attempt()
    except (ValueError, TypeError, OSError) as error:
        print(f"{what}: {type(error).__name__}: {error}")
    else:
        raise SystemExit(f"not refused: {what}")
PY
run env PYTHONPATH="kernels${PYTHONPATH:+:$PYTHONPATH}" python wrong.py "$checkout/runs/demo"
