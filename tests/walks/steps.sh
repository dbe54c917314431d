# Sourced by the walks. `run COMMAND...` shows a command as it is typed, its output, and its seconds;
# `refused WORDS COMMAND...` one that must end in one error that says WORDS; `says WORDS` what
# the last output must have.
set -euo pipefail
last=$(mktemp) log=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$last" "$log"' EXIT

shown() {
  local word
  printf '\n$'
  for word in "$@"; do
    if [[ $word == *[\ \(\;]* ]]; then printf " '%s'" "$word"; else printf ' %s' "$word"; fi
  done
  echo
}

run() {
  local begun=$SECONDS
  shown "$@"
  if ! "$@" >"$last" 2>&1; then
    cat "$last"
    echo "FAILED: $*"
    return 1
  fi
  cat "$last"
  printf '  (%d s)\n' $((SECONDS - begun))
}

refused() {
  local words=$1
  shift
  shown "$@"
  if "$@" >"$last" 2>&1; then
    cat "$last"
    echo "FAILED: was not refused: $*"
    return 1
  fi
  cat "$last"
  no_traceback
  says "$words"
}

no_traceback() {
  if grep -q Traceback "$last"; then
    echo "FAILED: a traceback"
    return 1
  fi
}

says() {
  grep -qF -- "$1" "$last" || { echo "FAILED: nothing says: $1"; return 1; }
}

# A command in the background: its number in $job, its output in the file $log.
begin() {
  shown "$@" "&"
  "$@" >"$log" 2>&1 &
  job=$!
}

# Ends it by a signal, waits, and shows what it said.
finish() {
  kill "$1" "$job"
  wait "$job" || true
  tee "$last" <"$log"
  no_traceback
}

# Waits, five minutes at most, until a file has the words.
until_there() {
  for _ in $(seq 3000); do
    if [ -e "$1" ] && grep -qF -- "$2" "$1"; then return; fi
    sleep 0.1
  done
  cat "$log"
  echo "FAILED: $1 has no $2"
  return 1
}
