#!/usr/bin/env bash
# Flickr8k by its official lists, of which dev is the split val (1.1 GB).
#
#     bash flickr8k.sh RAW OUT [options of captionscale pack ...]
#
# What RAW has already is not downloaded: the folder Flicker8k_Dataset (so spelled), Flickr8k.token.txt and
# Flickr_8k.{train,dev,test}Images.txt, or the two zips. FLICKR8K_URL names a mirror of the folder of the zips.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/recipe.sh"

fetch \
    Flicker8k_Dataset "$FLICKR8K_URL/Flickr8k_Dataset.zip" \
    Flickr8k.token.txt "$FLICKR8K_URL/Flickr8k_text.zip" \
    Flickr_8k.trainImages.txt "$FLICKR8K_URL/Flickr8k_text.zip" \
    Flickr_8k.devImages.txt "$FLICKR8K_URL/Flickr8k_text.zip" \
    Flickr_8k.testImages.txt "$FLICKR8K_URL/Flickr8k_text.zip"
captionscale pack flickr8k --images "$raw/Flicker8k_Dataset" --captions "$raw/Flickr8k.token.txt" \
    --splits "$raw" --out "$out" --expect train=6000 --expect val=1000 --expect test=1000 "$@"
verify
