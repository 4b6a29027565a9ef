#!/bin/bash
# Everything that several GPUs of one host can show, unattended: exchange, correctness, training, the peer, a fault.
#
#   scripts/multi_gpu.sh [--out DIR] [--gpus N] [--stages "comm verify train peer fault"] [--program PATH] [--tiny]
#                        [--backend cuda|cpu] [--only PATTERN] [--limit SECONDS]
#
# Build before: cargo build --release -p xtask && cargo build --release -p bridge-parallel --example nccl_check
# Each stage takes at most ten minutes. Results are JSON lines in DIR/results.jsonl, everything else is in DIR/*.log, and
# a table comes last. The exit code is 0 when every check held and every measurement came about.
# --tiny takes models that train in seconds, to try the script itself; --backend cpu does so with processes on the CPU.
# --only runs the steps whose names match; --limit is how long one step of the verify stage may take.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 3

out=out/multi_gpu
gpus=
stages="comm verify train peer fault"
program=target/release/xtask
backend=cuda
tiny=
only=.
limit=120
usage() { sed -n '2,12p' "$0" >&2; exit 2; }
while [ "$#" -gt 0 ]; do
    case "$1" in
        --tiny) tiny=yes; shift; continue ;;
        --out | --gpus | --stages | --program | --backend | --only | --limit) [ "$#" -ge 2 ] || usage ;;
        *) usage ;;
    esac
    case "$1" in
        --out) out="$2" ;;
        --gpus) gpus="$2" ;;
        --stages) stages="$2" ;;
        --program) program="$2" ;;
        --backend) backend="$2" ;;
        --only) only="$2" ;;
        --limit) limit="$2" ;;
    esac
    shift 2
done
case "$backend" in
    cuda) [ -n "$gpus" ] || gpus="$(nvidia-smi --list-gpus | wc -l)" ;;
    cpu) tiny=yes; gpus="${gpus:-2}" ;;
    *) usage ;;
esac
case "$gpus" in
    1 | 2 | 4 | 8) ;;
    *) echo "this host shows ${gpus:-0} GPUs; 1, 2, 4 or 8 are needed" >&2; exit 2 ;;
esac
mkdir -p "$out"
results="$out/results.jsonl"
: > "$results"
failures=0
half=$((gpus > 1 ? gpus / 2 : 1))
# Multicast over NVLink hangs on hosts whose fabric is shared with other tenants.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# record STAGE NAME LOG EXIT_CODE: the JSON lines of LOG, later ones over earlier ones, become a result.
record() {
    take_down "$@" && return
    failures=$((failures + 1))
    # What each rank said last.
    grep -a . "$3.err" 2> /dev/null | tail -n 12 | cut -c1-400 >&2
    return 1
}
take_down() {
    python3 - "$results" "$@" <<'PY'
import json, sys
results, stage, name, log, code = sys.argv[1:]
found = {}
for line in open(log, errors="replace"):
    try:
        value = json.loads(line)
    except ValueError:
        continue
    if isinstance(value, dict):
        found.update(value)
ok = code == "0" and bool(found) and found.get("passed", True)
with open(results, "a") as out:
    out.write(json.dumps({**found, "stage": stage, "name": name, "ok": ok, "exit_code": int(code)}) + "\n")
sys.exit(0 if ok else 1)
PY
}

# log_of STAGE NAME: where the output of a step goes.
log_of() { echo "$out/$1-${2//[^a-zA-Z0-9_.=-]/_}.log"; }

# run STAGE NAME LIMIT COMMAND...: runs, logs, records.
run() {
    local stage="$1" name="$2" limit="$3" log
    shift 3
    is_wanted "$name" || return 0
    log="$(log_of "$stage" "$name")"
    echo "== $stage: $name" >&2
    timeout --kill-after=30 "$limit" "$@" > "$log" 2> "$log.err"
    record "$stage" "$name" "$log" "$?"
}

is_wanted() { [[ "$1" =~ $only ]]; }

# What starts a job; the number of ranks comes next.
launch=("$program" launch --timeout 120 --nproc)

in_stage() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if in_stage comm; then
    # Every collective against the thread transport, then a rank that dies while the others wait for it on their GPUs.
    check="$(dirname "$program")/examples/nccl_check"
    if [ "$backend" = cuda ] && [ -x "$check" ]; then
        for die in "" --die; do
            [ -n "$die" ] && [ "$gpus" -eq 1 ] && continue
            log="$(log_of comm "nccl_check$die")"
            # shellcheck disable=SC2086
            timeout --kill-after=30 200 "$check" "$gpus" $die > "$log" 2>&1
            code=$?
            echo "{\"passed\": $([ "$code" -eq 0 ] && echo true || echo false)}" >> "$log"
            record comm "nccl_check $die" "$log" "$code"
        done
    fi
    sizes="1MB 64MB 512MB"
    seconds=2
    [ -n "$tiny" ] && sizes=64KB && seconds=0.1
    for size in $sizes; do
        log="$(log_of comm "$size")"
        echo "== comm: $size" >&2
        timeout --kill-after=30 200 "${launch[@]}" "$gpus" -- \
            bench comm --backend "$backend" --bytes "$size" --seconds "$seconds" > "$log" 2> "$log.err"
        code="$?"
        python3 - "$results" "$size" "$log" "$code" <<'PY' || failures=$((failures + 1))
import json, sys
results, size, log, code = sys.argv[1:]
lines = [json.loads(line) for line in open(log) if line.startswith("{")]
with open(results, "a") as out:
    for line in lines or [{}]:
        name = f"{line.get('collective', 'none')} {size}"
        out.write(json.dumps({**line, "stage": "comm", "name": name, "ok": code == "0" and bool(lines)}) + "\n")
sys.exit(0 if code == "0" and lines else 1)
PY
    done
fi

if in_stage verify; then
    # A dense model, experts, latent attention with experts, a hybrid. Sums in another order: the bounds of one GPU, doubled.
    start=$SECONDS
    wrong=0
    launch=("$program" launch --timeout $((limit / 2)) --grace 5 --nproc)
    for fixture in llama3_1 qwen3_moe deepseek_v3 nemotron_h; do
        folder="tests/fixtures/$fixture"
        check=(verify --hf "$folder" --reference "$folder" --grads --backend "$backend" --json)
        run verify "$fixture alone" "$limit" "$program" "${check[@]}" || wrong=$((wrong + 1))
        layouts=("--dp $gpus")
        if [ "$gpus" -ge 2 ]; then
            layouts+=("--tp 2 --dp $half" "--tp 2 --sp --dp $half" "--pp 2 --dp $half" "--cp 2 --dp $half")
            case "$fixture" in
                qwen3_moe | deepseek_v3) layouts+=("--ep 2 --dp $gpus" "--ep 2 --tp 2 --dp $half") ;;
            esac
        fi
        if [ "$gpus" -ge 4 ]; then
            layouts+=("--tp 2 --pp 2 --dp $((gpus / 4))" "--tp 2 --cp 2 --sp --dp $((gpus / 4))")
        fi
        for layout in "${layouts[@]}"; do
            if [ $((SECONDS - start)) -ge 600 ] || [ "$wrong" -ge 4 ]; then
                echo "== verify: given up after $wrong failures and $((SECONDS - start)) s" >&2
                failures=$((failures + 1))
                break 2
            fi
            # shellcheck disable=SC2086
            run verify "$fixture $layout" "$limit" "${launch[@]}" "$gpus" -- "${check[@]}" --atol 2e-4 --rtol 2e-3 $layout ||
                wrong=$((wrong + 1))
        done
    done
    launch=("$program" launch --timeout 120 --nproc)
fi

# The model that trains, its sequences, and short runs' settings.
recipe=llama32_1b
seq=4096
steps=14
skipped=4
if [ -n "$tiny" ]; then
    recipe=tiny_llama
    seq=64
    steps=6
    skipped=2
fi
quiet=(data.source=mock tokenizer.kind=null eval.eval_interval=0 logging.log_interval=1 logging.tensorboard=false
    logging.plot=false)

# train NAME RANKS RECIPE SEQ OVERRIDES...: short pretraining on made-up tokens; the median step of the last ones counts.
# RANKS 0 is one rank without a job.
train() {
    local name="$1" ranks="$2" recipe="$3" seq="$4" dir log job=() code
    shift 4
    is_wanted "$name" || return 0
    dir="$out/train-${name//[^a-zA-Z0-9_.=-]/_}"
    log="$dir.log"
    rm -rf "$dir"
    echo "== train: $name" >&2
    if [ "$ranks" -gt 0 ]; then job=("${launch[@]}" "$ranks" --); else job=("$program"); fi
    timeout --kill-after=30 280 "${job[@]}" pretrain "$recipe" --json --exposed-comm --backend "$backend" "${quiet[@]}" \
        "data.seq_length=$seq" "train.train_iters=$steps" checkpoint.save=false "checkpoint.dir=$dir" "$@" \
        > "$log" 2> "$log.err"
    code="$?"
    python3 - "$dir/metrics.jsonl" "$name" "$recipe" "$ranks" "$skipped" >> "$log" <<'PY'
import json, statistics, sys
path, name, recipe, ranks, skipped = sys.argv[1:]
ranks = max(int(ranks), 1)
try:
    steps = [json.loads(line) for line in open(path)]
except OSError:
    steps = []
steps = [step for step in steps if "step_ms" in step][int(skipped):]
if steps:
    ms = statistics.median(step["step_ms"] for step in steps)
    rate = statistics.median(step["tokens_per_s"] for step in steps) / ranks
    found = {"shape": recipe, "layout": name, "gpus": ranks, "step_ms": round(ms, 2), "tokens_per_s_per_gpu": round(rate, 1)}
    if "tflops_per_s" in steps[-1]:
        found["tflops_per_s_per_gpu"] = round(statistics.median(step["tflops_per_s"] for step in steps) / ranks, 4)
    print(json.dumps(found))
else:
    print(json.dumps({"passed": False, "layout": name, "gpus": ranks}))
PY
    record train "$name" "$log" "$code"
}

if in_stage train; then
    p=parallel
    one="train.micro_batch_size=1"
    train "$recipe one GPU" 0 "$recipe" "$seq" $one train.global_batch_size=4
    # What the communicator itself costs.
    train "$recipe dp=1" 1 "$recipe" "$seq" $one train.global_batch_size=4
    if [ "$gpus" -gt 1 ]; then
        train "$recipe dp=$gpus" "$gpus" "$recipe" "$seq" $one "train.global_batch_size=$((4 * gpus))" \
            "$p.data_parallel_size=$gpus" "$p.use_distributed_optimizer=true"
        train "$recipe tp=$gpus" "$gpus" "$recipe" "$seq" $one train.global_batch_size=4 \
            "$p.tensor_model_parallel_size=$gpus" "$p.sequence_parallel=true"
        train "$recipe pp=$gpus" "$gpus" "$recipe" "$seq" $one "train.global_batch_size=$((4 * gpus))" \
            "$p.pipeline_model_parallel_size=$gpus"
        train "$recipe cp=$gpus" "$gpus" "$recipe" "$seq" $one train.global_batch_size=4 "$p.context_parallel_size=$gpus"
        [ "$gpus" -gt 2 ] && train "$recipe tp=2 dp=$half" "$gpus" "$recipe" "$seq" $one "train.global_batch_size=$((4 * half))" \
            "$p.tensor_model_parallel_size=2" "$p.data_parallel_size=$half" "$p.sequence_parallel=true"
    fi
    if [ -z "$tiny" ]; then
        # Eight of the layers fit one GPU of 80 GB as they are: what scaling is measured against.
        few() { local name="$1" ranks="$2"; shift 2; train "llama3_8b/8 $name" "$ranks" llama3_8b 8192 $one \
            model.num_hidden_layers=8 "$p.context_parallel_size=1" "$@"; }
        few "one GPU" 0 train.global_batch_size=2
        # All of them, with layers recomputed, and gradients and first moments in bf16. One GPU needs 93 GiB.
        all() { local name="$1" ranks="$2"; shift 2; train "llama3_8b $name" "$ranks" llama3_8b 8192 $one \
            train.recompute_granularity=full optimizer.main_grads_dtype=bf16 optimizer.exp_avg_dtype=bf16 \
            "$p.context_parallel_size=1" "$@"; }
        roomy="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)"
        [ "${roomy:-0}" -gt 100000 ] && all "one GPU" 0 train.global_batch_size=2
        if [ "$gpus" -gt 1 ]; then
            few "tp=$gpus" "$gpus" train.global_batch_size=2 "$p.tensor_model_parallel_size=$gpus" "$p.sequence_parallel=true"
            all "tp=$gpus" "$gpus" train.global_batch_size=2 "$p.tensor_model_parallel_size=$gpus" "$p.sequence_parallel=true"
            all "pp=$gpus" "$gpus" "train.global_batch_size=$((4 * gpus))" "$p.pipeline_model_parallel_size=$gpus"
            all "dp=$gpus" "$gpus" "train.global_batch_size=$((2 * gpus))" "$p.data_parallel_size=$gpus" \
                "$p.use_distributed_optimizer=true" "$p.data_parallel_sharding_strategy=optim_grads_params"
            all "cp=$gpus" "$gpus" train.global_batch_size=2 "$p.context_parallel_size=$gpus" "$p.use_distributed_optimizer=true" \
                "$p.data_parallel_sharding_strategy=optim_grads_params"
        fi
        [ "$gpus" -gt 2 ] && all "tp=2 dp=$half" "$gpus" "train.global_batch_size=$((2 * half))" \
            "$p.tensor_model_parallel_size=2" "$p.data_parallel_size=$half" "$p.sequence_parallel=true" \
            "$p.use_distributed_optimizer=true"
    fi
fi

if in_stage peer; then
    python="${PEER_PYTHON:-python3}"
    if "$python" -c 'import torch' 2> /dev/null; then
        # peer NAME GPUS ARGUMENTS...
        peer() {
            local name="$1" ranks="$2"
            shift 2
            run peer "$name" 400 "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
                scripts/torch_fsdp2_train.py "$@"
        }
        settings=(--shape "$recipe" --seq "$seq" --batch 4)
        [ "$backend" = cpu ] && settings+=(--device cpu)
        [ -n "$tiny" ] && settings+=(--steps 3 --warmup 1)
        peer "$recipe one GPU" 1 "${settings[@]}"
        [ "$gpus" -gt 1 ] && peer "$recipe dp=$gpus" "$gpus" "${settings[@]}"
        if [ "$gpus" -gt 1 ] && [ -z "$tiny" ]; then
            peer "llama3_8b dp=$gpus" "$gpus" --shape llama3_8b --seq 8192 --batch 1 --checkpoint
        fi
    else
        echo '{"stage": "peer", "name": "torch", "ok": false, "reason": "no PyTorch here; PEER_PYTHON names one that has it"}' \
            >> "$results"
        failures=$((failures + 1))
    fi
fi

if in_stage fault; then
    # A rank is killed in the middle of a run; the others must end in good time and name it. Then half the GPUs go on.
    dir="$out/fault"
    log="$out/fault.log"
    rm -rf "$dir"
    echo "== fault" >&2
    [ -n "$tiny" ] || seq=1024
    settings=(pretrain "$recipe" --json --backend "$backend" "${quiet[@]}" "data.seq_length=$seq" train.micro_batch_size=1
        "train.global_batch_size=$gpus" checkpoint.save_interval=10 "checkpoint.dir=$dir")
    "$program" launch --nproc "$gpus" --timeout 30 -- "${settings[@]}" train.train_iters=100000 \
        "parallel.data_parallel_size=$gpus" parallel.use_distributed_optimizer=true > "$log" 2> "$log.err" &
    launcher=$!
    for _ in $(seq 300); do
        [ -e "$dir/latest" ] && break
        kill -0 "$launcher" 2> /dev/null || break
        sleep 1
    done
    sleep 3
    lost=$((gpus > 1 ? 1 : 0))
    victim="$(sed -n "s/^\[launch\] rank $lost is process //p" "$log.err")"
    killed=$SECONDS
    [ -n "$victim" ] && kill -KILL "$victim"
    for _ in $(seq 60); do
        kill -0 "$launcher" 2> /dev/null || break
        sleep 0.5
    done
    took=$((SECONDS - killed))
    if kill -0 "$launcher" 2> /dev/null; then kill -KILL "$launcher"; fi
    wait "$launcher"
    code=$?
    named=0
    for rank in $(seq 0 $((gpus - 1))); do
        [ "$rank" -ne "$lost" ] && grep -q "^\[rank $rank\] .*rank $lost is gone" "$log.err" && named=$((named + 1))
    done
    passed=false
    [ -n "$victim" ] && [ -e "$dir/latest" ] && [ "$code" -eq 3 ] && [ "$took" -le 30 ] && [ "$named" -eq $((gpus - 1)) ] \
        && passed=true
    echo "{\"passed\": $passed, \"launcher_exit\": $code, \"seconds\": $took, \"ranks_that_name_it\": $named}" >> "$log"
    record fault "rank $lost of $gpus killed" "$log" 0
    last="$(cat "$dir/latest" 2> /dev/null)"
    last="${last#iter_}"
    last=$((10#${last:-0}))
    run fault "resumed on $half" 280 "${launch[@]}" "$half" -- "${settings[@]}" \
        "train.train_iters=$((last + 20))" "parallel.data_parallel_size=$half"
    # It went on from the checkpoint: the first step of the second run is the one after it.
    log="$(log_of fault "steps in order")"
    python3 - "$dir/metrics.jsonl" "$last" > "$log" 2> "$log.err" <<'PY'
import json, sys
steps = [json.loads(line)["iteration"] for line in open(sys.argv[1]) if '"step_ms"' in line]
last = int(sys.argv[2])
ordered = steps == list(range(1, last + 21))
print(json.dumps({"passed": last > 0 and ordered, "checkpoint": last, "steps": len(steps)}))
PY
    record fault "steps in order" "$log" "$?"
fi

python3 - "$results" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
shown = ["gpus", "step_ms", "tokens_per_s_per_gpu", "tflops_per_s_per_gpu", "model_tflops_per_gpu", "peak_gib", "exposed_comm", "us",
         "bus_gb_per_s", "logits_max_abs_diff", "grad_norm_max_rel_diff", "seconds"]
print(f"{'stage':8} {'what':44} {'ok':5} figures")
for row in rows:
    figures = ", ".join(f"{key} {row[key]:.6g}" for key in shown if isinstance(row.get(key), (int, float)))
    print(f"{row['stage']:8} {row['name']:44} {'yes' if row['ok'] else 'NO':5} {figures or row.get('reason', '')}")
rate = {(r["stage"], r["name"]): r.get("tokens_per_s_per_gpu") for r in rows}
for (stage, name), value in rate.items():
    shape = name.split(" ")[0]
    base = rate.get((stage, f"{shape} one GPU"))
    if value and base and not name.endswith("one GPU"):
        print(f"scaling efficiency, {stage}, {name}: {value / base:.3f}")
    peer = rate.get(("peer", name))
    if stage == "train" and value and peer:
        print(f"against the peer, {name}: {value / peer:.3f}")
PY
[ "$failures" -eq 0 ]
