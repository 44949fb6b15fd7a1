#!/usr/bin/env bash
# COCO 2017 by its official splits; test has no captions (27 GB).
#
#     bash coco2017.sh RAW OUT [options of captionscale pack ...]
#
# What RAW has already is not downloaded: the folders train2017, val2017 and test2017, and in the folder
# annotations captions_train2017.json, captions_val2017.json and image_info_test2017.json, or their zips.
# COCO_URL names a mirror of http://images.cocodataset.org.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/recipe.sh"

fetch \
    train2017 "$COCO_URL/zips/train2017.zip" \
    val2017 "$COCO_URL/zips/val2017.zip" \
    test2017 "$COCO_URL/zips/test2017.zip" \
    annotations/captions_train2017.json "$COCO_URL/annotations/annotations_trainval2017.zip" \
    annotations/captions_val2017.json "$COCO_URL/annotations/annotations_trainval2017.zip" \
    annotations/image_info_test2017.json "$COCO_URL/annotations/image_info_test2017.zip"
pack_coco train 118287 train2017 annotations/captions_train2017.json "$@"
pack_coco val 5000 val2017 annotations/captions_val2017.json "$@"
pack_coco test 40670 test2017 annotations/image_info_test2017.json "$@"
verify
