#!/usr/bin/env bash
# Flickr30k by Karpathy's split.
#
#     bash flickr30k.sh RAW OUT [options of captionscale pack ...]
#
# The authors provide the images (4 GB) on request, by the form at
# https://shannon.cs.illinois.edu/DenotationGraph/: unpack them so that RAW/flickr30k-images/1000092795.jpg is one.
# RAW/dataset_flickr30k.json is downloaded unless it is there, or caption_datasets.zip, which contains it.
# KARPATHY_URL names a mirror of the zip's folder.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/recipe.sh"

[[ -d $raw/flickr30k-images ]] ||
    fail "$raw/flickr30k-images: no such folder, expected the images; $0 says at its top where to ask for them"
fetch dataset_flickr30k.json "$KARPATHY_URL/caption_datasets.zip"
captionscale pack karpathy --images "$raw/flickr30k-images" --captions "$raw/dataset_flickr30k.json" --out "$out" \
    --expect train=29000 --expect val=1014 --expect test=1000 "$@"
verify
