#!/usr/bin/env bash
# COCO 2014 by its official splits; test has no captions (27 GB).
#
#     bash coco2014.sh RAW OUT [options of captionscale pack ...]
#
# What RAW has already is not downloaded: the folders train2014, val2014 and test2014, and in the folder
# annotations captions_train2014.json, captions_val2014.json and image_info_test2014.json, or their zips.
# COCO_URL names a mirror of http://images.cocodataset.org.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/recipe.sh"

fetch \
    train2014 "$COCO_URL/zips/train2014.zip" \
    val2014 "$COCO_URL/zips/val2014.zip" \
    test2014 "$COCO_URL/zips/test2014.zip" \
    annotations/captions_train2014.json "$COCO_URL/annotations/annotations_trainval2014.zip" \
    annotations/captions_val2014.json "$COCO_URL/annotations/annotations_trainval2014.zip" \
    annotations/image_info_test2014.json "$COCO_URL/annotations/image_info_test2014.zip"
pack_coco train 82783 train2014 annotations/captions_train2014.json "$@"
pack_coco val 40504 val2014 annotations/captions_val2014.json "$@"
pack_coco test 40775 test2014 annotations/image_info_test2014.json "$@"
verify
