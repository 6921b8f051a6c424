"""model.py copied alone into an empty folder: it trains, and generates with its KV cache."""

import shutil
import subprocess
import sys

from conftest import ENVIRONMENT, REPO

SCRIPT = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
text = b"the quick brown fox jumps over the lazy dog. " * 50
ids = torch.tensor(list(text))
modern = {"rotary": True, "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 2, "activation": "swiglu"}
for changes in ({}, modern):
    model = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=2, n_head=4, n_embd=64, **changes))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
    for step in range(100):
        starts = torch.randint(len(ids) - 65, (8,))
        batch = torch.stack([ids[i : i + 65] for i in starts])
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3, loss
    model.eval()
    prompt = torch.tensor([list(b"the quick brown fox jumps over the lazy")])
    out = model.generate(prompt, 100, temperature=0)
    print(bytes(out[0].tolist()).decode())
    with torch.no_grad():  # without the cache, up to block_size
        idx = prompt
        for _ in range(25):
            idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(idx, out[:, : idx.size(1)])
ours = [name for name in sys.modules if name.split(".")[0] in ("distrogpt", "configurator", "transformers")]
assert ours == [], ours
"""


def test_model_py_alone_trains_and_generates(tmp_path):
    shutil.copy(REPO / "model.py", tmp_path)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.splitlines()
    assert len(texts) == 2 and all("lazy dog. the quick brown fox" in text for text in texts), texts
