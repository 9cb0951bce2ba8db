#!/usr/bin/env bash
# ImageNet-1k (or any images in class folders) -> webdataset shards with an index: OUT/train and OUT/validation.
#
#   scripts/make_imagenet_shards.sh IMAGES OUT
#
# IMAGES holds train/CLASS/*.JPEG and val/CLASS/*.JPEG (or validation/): the 50,000 validation images must lie in class
# folders, too, not side by side. Files are copied as they are, so OUT is as large as IMAGES; a shard has 5,000 images, about
# 600 MB of ImageNet, and is read back into memory once. NUM_CLASSES (1000) is checked before anything is written.
# Interrupted, the same command starts the unfinished half (train, validation) again; a finished half is kept.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
fail() { printf 'make_imagenet_shards.sh: %s\n' "$*" >&2; exit 2; }

[ $# -eq 2 ] || fail "expected IMAGES OUT; see --help"
images=$1 out=$2 classes=${NUM_CLASSES:-1000}
validation=$images/validation
[ -d "$validation" ] || validation=$images/val
for part in "$images/train" "$validation"; do
    [ -d "$part" ] || fail "$part: no such folder; expected IMAGES/train and IMAGES/val"
    found=$(find -L "$part" -mindepth 1 -maxdepth 1 -type d | wc -l)
    [ "$found" -eq "$classes" ] || fail "$part: holds $found class folders, expected $classes (NUM_CLASSES=N for other data)"
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/scripts/m2mkd" shards write --source image_folder --path "$images" --out "$out"
