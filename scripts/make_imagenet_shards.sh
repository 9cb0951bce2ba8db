#!/usr/bin/env bash
# ImageNet-1k (or any images in class folders) -> webdataset shards with an index: OUT/train and OUT/validation.
#
#   scripts/make_imagenet_shards.sh IMAGES OUT [OPTIONS]
#   scripts/make_imagenet_shards.sh IMAGES OUT --resize-short 384 --quality 90 --workers 16
#
# IMAGES holds train/CLASS/*.JPEG and val/CLASS/*.JPEG (or validation/): the 50,000 validation images must lie in class
# folders, too, not side by side. NUM_CLASSES (1000) class folders are expected in both; that is checked before anything is written.
# Files are copied as they are, so OUT is as large as IMAGES, unless OPTIONS say otherwise: they are passed to `m2mkd shards write`
# (its --help lists them). --resize-short 384 --quality 90 encodes larger images anew, with a shorter side of 384 pixels.
# Interrupted, the same command goes on where it was: whole shards are kept.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
fail() { printf 'make_imagenet_shards.sh: %s\n' "$*" >&2; exit 2; }

[ $# -ge 2 ] || fail "expected IMAGES OUT [OPTIONS]; see --help"
images=$1 out=$2 classes=${NUM_CLASSES:-1000}
shift 2
case "$images:$out" in -* | *:-*) fail "options come behind IMAGES and OUT; see --help" ;; esac
validation=$images/validation
[ -d "$validation" ] || validation=$images/val
for part in "$images/train" "$validation"; do
    [ -d "$part" ] || fail "$part: no such folder; expected IMAGES/train and IMAGES/val"
    found=$(find -L "$part" -mindepth 1 -maxdepth 1 -type d | wc -l)
    [ "$found" -eq "$classes" ] || fail "$part: holds $found class folders, expected $classes (NUM_CLASSES=N for other data)"
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/scripts/m2mkd" shards write --source image_folder --path "$images" --out "$out" "$@"
