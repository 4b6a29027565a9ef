#!/bin/bash
# Everything that several GPUs of one host can show, unattended: exchange, correctness, training, the peer, a fault.
#
#   scripts/multi_gpu.sh [--out DIR] [--gpus N] [--stages "comm verify train peer fault"] [--program PATH]
#
# Build before: cargo build --release -p xtask && cargo build --release -p bridge-parallel --example nccl_check
# Each stage takes at most ten minutes. Results are JSON lines in DIR/results.jsonl, everything else is in DIR/*.log, and
# a table comes last. The exit code is 0 when every check held and every measurement came about.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 3

out=out/multi_gpu
gpus=
stages="comm verify train peer fault"
program=target/release/xtask
while [ "$#" -gt 0 ]; do
    case "$1" in
        --out) out="$2" ;;
        --gpus) gpus="$2" ;;
        --stages) stages="$2" ;;
        --program) program="$2" ;;
        *) sed -n '2,9p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
mkdir -p "$out"
results="$out/results.jsonl"
: > "$results"
failures=0

# Multicast over NVLink hangs on hosts whose fabric is shared with other tenants.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
[ -n "$gpus" ] || gpus="$(nvidia-smi --list-gpus | wc -l)"
case "$gpus" in
    2 | 4 | 8) ;;
    *) echo "this host shows ${gpus:-0} GPUs; 2, 4 or 8 are needed" >&2; exit 2 ;;
esac
half=$((gpus / 2))

# record STAGE NAME LOG EXIT_CODE: the last JSON line of LOG becomes a result.
record() {
    python3 - "$results" "$@" <<'PY' || failures=$((failures + 1))
import json, sys
results, stage, name, log, code = sys.argv[1:]
found = {}
for line in open(log, errors="replace"):
    try:
        value = json.loads(line)
    except ValueError:
        continue
    if isinstance(value, dict):
        found = value
ok = code == "0" and found.get("passed", True)
json.dump({"stage": stage, "name": name, "ok": ok, "exit_code": int(code), **found}, open(results, "a"))
open(results, "a").write("\n")
sys.exit(0 if ok else 1)
PY
}

# run STAGE NAME LIMIT COMMAND...: runs, logs, records.
run() {
    local stage="$1" name="$2" limit="$3" log
    shift 3
    log="$out/$stage-${name//[^a-zA-Z0-9_.=-]/_}.log"
    echo "== $stage: $name" >&2
    timeout --kill-after=30 "$limit" "$@" > "$log" 2> "$log.err"
    record "$stage" "$name" "$log" "$?"
}

ranks() { "$program" launch --nproc "$1" --timeout 120 -- "${@:2}"; }
export -f ranks
export program

in_stage() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if in_stage comm; then
    # Every collective against the thread transport, then a rank that dies while the others wait for it on their GPUs.
    check="$(dirname "$program")/examples/nccl_check"
    if [ -x "$check" ]; then
        run comm "nccl_check" 200 "$check" "$gpus"
        run comm "nccl_check --die" 100 "$check" "$gpus" --die
    fi
    log="$out/comm.log"
    for size in 1MB 64MB 512MB; do
        timeout 200 "$program" launch --nproc "$gpus" --timeout 60 -- \
            bench comm --backend cuda --bytes "$size" --seconds 2 > "$log" 2> "$log.$size.err"
        code="$?"
        [ "$code" -eq 0 ] || failures=$((failures + 1))
        python3 - "$results" "$size" "$log" "$code" <<'PY'
import json, sys
results, size, log, code = sys.argv[1:]
with open(results, "a") as out:
    lines = [json.loads(line) for line in open(log) if line.startswith("{")]
    for line in lines or [{}]:
        name = f"{line.get('collective', 'none')} {size}"
        out.write(json.dumps({"stage": "comm", "name": name, "ok": code == "0" and bool(lines), **line}) + "\n")
PY
    done
fi

# Fixtures that exist: a dense model, and those of other kinds as far as this tree has them.
fixtures=()
for name in llama3_1 mixtral qwen3_moe deepseek_v3 nemotron_h; do
    [ -d "tests/fixtures/$name" ] && fixtures+=("$name")
done

if in_stage verify; then
    start=$SECONDS
    for fixture in "${fixtures[@]}"; do
        folder="tests/fixtures/$fixture"
        layouts=("--dp $gpus" "--tp 2 --dp $half" "--cp 2 --dp $half" "--pp 2 --dp $half" "--tp 2 --sp --dp $half")
        [ "$gpus" -gt 2 ] && layouts+=("--tp 2 --pp 2 --dp $((gpus / 4))" "--tp 2 --cp 2 --dp $((gpus / 4))")
        if ls "$folder"/config.json > /dev/null 2>&1 && grep -q '"num_experts\|num_local_experts\|n_routed_experts' "$folder/config.json"; then
            layouts+=("--ep $gpus --dp $gpus" "--ep 2 --tp 2 --dp $half")
        fi
        run verify "$fixture one GPU" 120 "$program" verify --hf "$folder" --reference "$folder" --grads --backend cuda --json
        for layout in "${layouts[@]}"; do
            [ $((SECONDS - start)) -lt 600 ] || break 2
            # shellcheck disable=SC2086
            run verify "$fixture $layout" 120 "$program" launch --nproc "$gpus" --timeout 60 -- \
                verify --hf "$folder" --reference "$folder" --grads --backend cuda --json $layout
        done
    done
fi

# train NAME RANKS RECIPE SEQ OVERRIDES...: short pretraining on made-up tokens; the median step of the last ones counts.
train() {
    local name="$1" ranks="$2" recipe="$3" seq="$4" dir log
    shift 4
    dir="$out/train-${name//[^a-zA-Z0-9_.=-]/_}"
    log="$dir.log"
    rm -rf "$dir"
    echo "== train: $name" >&2
    timeout --kill-after=30 280 "$program" launch --nproc "$ranks" --timeout 120 -- \
        pretrain "$recipe" --backend cuda data.source=mock "data.seq_length=$seq" train.train_iters=14 \
        checkpoint.save=false eval.eval_iters=0 eval.eval_interval=0 logging.log_interval=1 \
        logging.tensorboard=false logging.plot=false "checkpoint.dir=$dir" "$@" > "$log" 2> "$log.err"
    local code="$?"
    python3 - "$dir/metrics.jsonl" "$name" "$recipe" "$ranks" "$code" >> "$log" <<'PY'
import json, statistics, sys
path, name, recipe, ranks, code = sys.argv[1:]
try:
    steps = [json.loads(line) for line in open(path)]
except OSError:
    steps = []
steps = [step for step in steps if "step_ms" in step][4:]
if steps:
    ms = statistics.median(step["step_ms"] for step in steps)
    rate = statistics.median(step["tokens_per_s"] for step in steps) / int(ranks)
    found = {"shape": recipe, "layout": name, "gpus": int(ranks), "step_ms": round(ms, 2), "tokens_per_s_per_gpu": round(rate, 1)}
    for key in ["tflops_per_s", "exposed_comm", "peak_gib"]:
        if key in steps[-1]:
            found[key] = steps[-1][key]
    print(json.dumps(found))
else:
    print(json.dumps({"passed": False, "layout": name, "gpus": int(ranks)}))
PY
    record train "$name" "$log" "$code"
}

if in_stage train; then
    p=parallel
    one="train.micro_batch_size=1"
    train "llama32_1b one GPU" 1 llama32_1b 4096 $one train.global_batch_size=4
    train "llama32_1b dp=$gpus" "$gpus" llama32_1b 4096 $one "train.global_batch_size=$((4 * gpus))" "$p.data_parallel_size=$gpus"
    train "llama32_1b tp=$gpus" "$gpus" llama32_1b 4096 $one train.global_batch_size=4 \
        "$p.tensor_model_parallel_size=$gpus" "$p.sequence_parallel=true"
    if [ "$gpus" -eq 8 ]; then
        cp1="$p.context_parallel_size=1"
        train "llama3_8b dp=8" 8 llama3_8b 8192 $one train.global_batch_size=16 $cp1 "$p.data_parallel_size=8" train.recompute_granularity=full
        train "llama3_8b tp=8" 8 llama3_8b 8192 $one train.global_batch_size=8 $cp1 "$p.tensor_model_parallel_size=8" "$p.sequence_parallel=true"
        train "llama3_8b tp=2 dp=4" 8 llama3_8b 8192 $one train.global_batch_size=16 $cp1 \
            "$p.tensor_model_parallel_size=2" "$p.data_parallel_size=4" "$p.sequence_parallel=true"
        train "llama3_8b pp=8" 8 llama3_8b 8192 $one train.global_batch_size=32 $cp1 "$p.pipeline_model_parallel_size=8"
        train "llama3_8b cp=8" 8 llama3_8b 8192 $one train.global_batch_size=8 "$p.context_parallel_size=8" train.recompute_granularity=full
    fi
fi

if in_stage peer; then
    torch() { torchrun --standalone --nproc-per-node "$1" scripts/torch_fsdp2_train.py "${@:2}"; }
    if python3 -c 'import torch' 2> /dev/null; then
        export -f torch
        run peer "llama32_1b one GPU" 300 bash -c "torch 1 --shape llama32_1b --seq 4096 --batch 4"
        run peer "llama32_1b dp=$gpus" 300 bash -c "torch $gpus --shape llama32_1b --seq 4096 --batch 4"
        [ "$gpus" -eq 8 ] && run peer "llama3_8b dp=8" 500 bash -c "torch 8 --shape llama3_8b --seq 8192 --batch 1 --checkpoint"
    else
        echo '{"stage": "peer", "name": "torch", "ok": false, "reason": "no PyTorch on this host"}' >> "$results"
        failures=$((failures + 1))
    fi
fi

if in_stage fault; then
    # A rank is killed in the middle of a run; the others must end in good time and name it. Then half the GPUs go on.
    dir="$out/fault"
    log="$out/fault.log"
    rm -rf "$dir"
    echo "== fault" >&2
    settings=(pretrain llama32_1b --backend cuda data.source=mock data.seq_length=1024 train.micro_batch_size=1
        "train.global_batch_size=$gpus" checkpoint.save_interval=10 eval.eval_iters=0 eval.eval_interval=0
        "checkpoint.dir=$dir" logging.tensorboard=false logging.plot=false)
    "$program" launch --nproc "$gpus" --timeout 30 -- "${settings[@]}" train.train_iters=100000 \
        "parallel.data_parallel_size=$gpus" > "$log" 2> "$log.err" &
    launcher=$!
    for _ in $(seq 300); do
        ls "$dir"/iter_* > /dev/null 2>&1 && break
        kill -0 "$launcher" 2> /dev/null || break
        sleep 1
    done
    sleep 3
    victim="$(sed -n 's/^\[launch\] rank 1 is process //p' "$log.err")"
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
        [ "$rank" -ne 1 ] && grep -q "^\[rank $rank\] .*rank 1 is gone" "$log.err" && named=$((named + 1))
    done
    passed=false
    [ "$code" -ne 0 ] && [ "$took" -le 30 ] && [ "$named" -eq $((gpus - 1)) ] && passed=true
    echo "{\"passed\": $passed, \"launcher_exit\": $code, \"seconds\": $took, \"ranks_that_name_it\": $named}" >> "$log"
    record fault "rank 1 of $gpus killed" "$log" 0
    last="$(basename "$(ls -d "$dir"/iter_* 2> /dev/null | tail -n 1)")"
    last="${last#iter_}"
    iterations=$((10#${last:-0} + 20))
    run fault "resumed on $half GPUs" 280 "$program" launch --nproc "$half" --timeout 60 -- "${settings[@]}" \
        "train.train_iters=$iterations" "parallel.data_parallel_size=$half"
fi

python3 - "$results" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
shown = ["gpus", "step_ms", "tokens_per_s_per_gpu", "tflops_per_s", "model_tflops_per_gpu", "peak_gib", "us", "bus_gb_per_s",
         "logits_max_abs_diff", "grad_norm_max_rel_diff", "seconds"]
print(f"{'stage':8} {'what':44} {'ok':5} figures")
for row in rows:
    figures = ", ".join(f"{key} {row[key]:.6g}" for key in shown if isinstance(row.get(key), (int, float)))
    print(f"{row['stage']:8} {row['name']:44} {'yes' if row['ok'] else 'NO':5} {figures}")
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
