"""What `captionscale pack` reads: name, class, help text, arguments of the example."""

SOURCES = {
    "coco": (
        "captionscale.data.sources.coco:Coco",
        "COCO 2014 or 2017 in its official files, or 2014 by lists of Karpathy's split",
        "--images images --captions captions.json --split train",
    ),
    "karpathy": (
        "captionscale.data.sources.karpathy:Karpathy",
        "COCO, Flickr8k or Flickr30k by Karpathy's dataset_*.json",
        "--images images --captions captions.json",
    ),
    "flickr8k": (
        "captionscale.data.sources.flickr:Flickr",
        "Flickr8k in its official files",
        "--images images --captions captions.txt --splits lists",
    ),
    "flickr30k": (
        "captionscale.data.sources.flickr:Flickr",
        "Flickr30k in its official files",
        "--images images --captions captions.txt --splits lists",
    ),
    "table": (
        "captionscale.data.sources.custom:Table",
        "your own images by a CSV or JSONL file: image,caption[,split][,image_id]",
        "--images images --captions captions.csv",
    ),
    "folder": (
        "captionscale.data.sources.custom:Folder",
        "your own images, each with a .txt of captions next to it, or without captions",
        "--images images",
    ),
    "webdataset": (
        "captionscale.data.sources.tars:WebDataset",
        "tars of images with .txt or .json, as img2dataset writes them",
        "--tars tars",
    ),
}
