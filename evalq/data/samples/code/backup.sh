#!/usr/bin/env bash
# Keeps daily snapshots of a folder on another disk; unchanged files are hard links to the day before.
# usage: backup.sh SOURCE TARGET [DAYS_TO_KEEP]
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    sed -n '3s/^# //p' "$0" >&2
    exit 64
fi

source_dir=$(realpath -- "$1")
target_dir=$(realpath -- "$2")
keep_days=${3:-30}
today=$(date +%F)
lock="$target_dir/.lock"

if ! mountpoint --quiet "$target_dir"; then
    echo "backup: $target_dir is not a mounted disk" >&2
    exit 1
fi

exec 9>"$lock"
if ! flock --nonblock 9; then
    echo "backup: another run holds $lock" >&2
    exit 75
fi

latest=$(find "$target_dir" -maxdepth 1 -type d -name '20??-??-??' ! -name "$today" | sort | tail -n 1)
links=()
[[ -n $latest ]] && links=(--link-dest="$latest")

partial="$target_dir/.partial-$today"
rsync --archive --delete --numeric-ids "${links[@]}" -- "$source_dir/" "$partial/"
rm -rf -- "${target_dir:?}/$today"
mv -- "$partial" "$target_dir/$today"

# Names sort as dates do, so what is older than the limit comes first.
oldest_kept=$(date --date "$keep_days days ago" +%F)
while IFS= read -r -d '' snapshot; do
    name=$(basename -- "$snapshot")
    if [[ $name < $oldest_kept ]]; then
        echo "backup: removing $name"
        rm -rf -- "$snapshot"
    fi
done < <(find "$target_dir" -maxdepth 1 -type d -name '20??-??-??' -print0)

printf 'backup: %s done, %s used\n' "$today" "$(du -sh "$target_dir/$today" | cut -f 1)"
