#!/usr/bin/env bash
# The maintainer of a cluster, with data in an object store: an array job prepares them, two ranks
# train under DeepSpeed, a rank dies, the queue starts the job again on more ranks.
#
#     tests/walks/cluster.sh FOLDER      in a checkout, with its environment active; a CPU is enough
. "$(dirname "$0")/steps.sh"
mkdir -p "$1"
cd "$1"
checkout=$OLDPWD
ln -sfn "$checkout/configs" configs
ln -sfn "$checkout/demo" demo
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

# What a store has for S3 here: a server on loopback.
python -m moto.server -H 127.0.0.1 -p 5555 >moto.log 2>&1 &
store=$!
export AWS_ENDPOINT_URL=http://127.0.0.1:5555 AWS_ACCESS_KEY_ID=walk AWS_SECRET_ACCESS_KEY=walk AWS_DEFAULT_REGION=us-east-1
until_there moto.log Running

# Preparing, as an array job of two tasks. The second dies; training refuses what is not whole.
run flap prepare demo/manifest.jsonl data/demo --shard-clips 64 --shard-range 1/2
refused "flap prepare" flap train configs/tiny.yaml run.name=early
run flap prepare demo/manifest.jsonl data/demo --shard-clips 64 --shard-range 2/2
run flap doctor data/demo --sample 100
run python - <<'PY'
import fsspec

store = fsspec.filesystem("s3")
store.mkdir("walk")
store.put("data/demo/", "walk/demo/", recursive=True)
print(*sorted(store.find("walk/demo/train")), sep="\n")
PY

# Before hours are booked.
run flap plan configs/flap.yaml data.train=data/demo/train --gpus 64 --nodes 8
refused "s3://walk/nowhere" flap train configs/tiny.yaml data.train=s3://walk/nowhere
refused "folders of them: train, val" flap train configs/tiny.yaml data.train=s3://walk/demo data.val=s3://walk/demo/val
refused "MASTER_ADDR" env SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NNODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 flap train configs/tiny.yaml

settings=(run.name=job data.train=s3://walk/demo/train data.val=s3://walk/demo/val data.cache=cache
  data.shuffle_shards=2 data.retry_s=10 train.zero_stage=2 train.steps=60 ckpt.every_steps=10 log.every_steps=5 eval.every_steps=0)
begin deepspeed --num_accelerators 2 --module flap_fast train configs/tiny.yaml "${settings[@]}"
until_there runs/job/metrics.jsonl '"step": 10'
refused "lock" flap train configs/tiny.yaml "${settings[@]}" --resume
echo 2 >runs/job/trace
until_there runs/job/metrics.jsonl '"step": 20'
rank=$(pgrep -f "local_rank=1.*run.name=job" | tail -1)
shown kill -9 "$rank" "# a rank"
kill -9 "$rank"
if wait "$job"; then
  echo "FAILED: the launcher says that all went well"
  exit 1
fi
cat "$log"

# The queue starts it again, on four ranks and another ZeRO stage, with an empty cache.
rm -r cache
run torchrun --nproc_per_node 4 -m flap_fast train configs/tiny.yaml "${settings[@]}" train.zero_stage=1 --resume
says "runs/job"
run head -c 1200 runs/job/environment.json
refused "loss at chance" flap doctor runs/job # 60 steps of random towers: the doctor says so

# SIGTERM, as scancel sends it: a checkpoint first.
begin flap train configs/tiny.yaml "${settings[@]}" run.name=cancelled train.engine=plain train.zero_stage=0
until_there runs/cancelled/metrics.jsonl '"step": 5'
finish -TERM
says "--resume"

# A shard that changed in the store, then a store that is gone.
run python - <<'PY'
import fsspec

store = fsspec.filesystem("s3")
shard = sorted(name for name in store.find("walk/demo/train") if name.endswith(".tar"))[0]
store.pipe(shard, store.cat(shard) + bytes(10240))
print(shard, "is longer now")
PY
refused "s3://walk/demo/train/0.tar" flap train configs/tiny.yaml "${settings[@]}" run.name=cancelled train.engine=plain train.zero_stage=0 --resume
kill $store
refused "s3://walk/demo/" flap train configs/tiny.yaml "${settings[@]}" run.name=gone train.engine=plain train.zero_stage=0 data.retry_s=3

# The embeddings of a folder, divided among ranks.
run torchrun --nproc_per_node 2 -m flap_fast embed demo/audio --out embeddings --model runs/job
