#!/usr/bin/env bash
# COCO by Karpathy's split, which nearly every paper scores on (20 GB).
#
#     bash karpathy.sh RAW OUT [options of captionscale pack ...]
#
# What RAW has already is not downloaded: the folders train2014 and val2014, and dataset_coco.json, or their
# zips. If caption_datasets.zip cannot be had, put karpathy_val_images.txt and karpathy_test_images.txt into RAW,
# such as from github.com/peteanderson80/bottom-up-attention, data/genome/coco_splits: they are used with
# COCO's official annotations instead. For --restval drop, add --expect train=82783.
# COCO_URL names a mirror of http://images.cocodataset.org, KARPATHY_URL one of caption_datasets.zip's folder.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/recipe.sh"

images=(train2014 "$COCO_URL/zips/train2014.zip" val2014 "$COCO_URL/zips/val2014.zip")
if [[ ! -e $raw/dataset_coco.json && -e $raw/karpathy_val_images.txt && -e $raw/karpathy_test_images.txt ]]; then
    fetch "${images[@]}" \
        annotations/captions_train2014.json "$COCO_URL/annotations/annotations_trainval2014.zip" \
        annotations/captions_val2014.json "$COCO_URL/annotations/annotations_trainval2014.zip"
    captions=(coco --captions "$raw"/annotations/captions_{train,val}2014.json --lists "$raw")
else
    fetch "${images[@]}" dataset_coco.json "$KARPATHY_URL/caption_datasets.zip"
    captions=(karpathy --captions "$raw/dataset_coco.json")
fi
captionscale pack "${captions[@]}" --images "$raw" --out "$out" \
    --expect train=113287 --expect val=5000 --expect test=5000 "$@"
verify
