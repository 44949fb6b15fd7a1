# shellcheck shell=bash
# What the recipes share: each sources this file, which reads their RAW OUT [options of captionscale pack ...].
set -euo pipefail

# Where data sets are downloaded from.
: "${COCO_URL:=http://images.cocodataset.org}"
: "${FLICKR8K_URL:=https://github.com/jbrownlee/Datasets/releases/download/Flickr8k}"
: "${KARPATHY_URL:=https://cs.stanford.edu/people/karpathy/deepimagesent}"

say() {
    printf '%s: %s\n' "${0##*/}" "${1//[[:cntrl:]]/?}" >&2
}

fail() {
    say "$1"
    exit 1
}

bytes() { # FILE
    if [[ -e $1 ]]; then wc -c <"$1"; else echo 0; fi
}

mb() { # BYTES
    echo "$((($1 + 999999) / 1000000)) MB"
}

# Make sure that RAW holds each path: what is missing is unpacked from its zip, which is downloaded if need be.
fetch() { # PATH URL [PATH URL ...], the paths of one zip side by side
    local paths=() urls=() sizes=() size=0 download=0 unpack=0 free tool zip i
    while (($#)); do
        if [[ ! -e $raw/$1 ]]; then
            paths+=("$1")
            urls+=("$2")
        fi
        shift 2
    done
    ((${#paths[@]})) || return 0
    for tool in curl unzip; do
        command -v "$tool" >/dev/null ||
            fail "no command $tool, expected it for what $raw lacks; install it, or put ${paths[*]} there yourself"
    done
    if ! mkdir -p "$raw" 2>/dev/null || [[ ! -w $raw ]]; then
        fail "$raw: cannot be written to, expected it for ${paths[*]}; take another folder, or put them there yourself"
    fi
    # Two writers would damage a download. After a kill -9 the lock stays with curl until it has ended too.
    exec 9<"$raw"
    ! command -v flock >/dev/null || flock --nonblock 9 || (($? != 1)) ||
        fail "$raw: another recipe is at work here, expected to be the only one; wait for its end, or stop it"
    for ((i = 0; i < ${#paths[@]}; i++)); do
        zip=$raw/${urls[i]##*/}
        if ((i == 0)) || [[ ${urls[i]} != "${urls[i - 1]}" ]]; then
            if [[ -e $zip ]]; then
                size=$(bytes "$zip")
            else
                size=$(bytes_at "${urls[i]}" "${paths[i]}")
                download=$((download + size - $(bytes "$zip.part")))
            fi
            unpack=$((unpack + size))
        fi
        sizes+=("$size")
    done
    free=$(($(df -Pk "$raw" | awk 'NR == 2 { print $4 }') * 1024))
    say "$(mb $download) to download and about $(mb $unpack) to unpack into $raw, which has $(mb $free) free"
    ((free >= download + unpack)) || fail "$raw: too little space; free some, or take another folder"
    for ((i = 0; i < ${#paths[@]}; i++)); do
        zip=$raw/${urls[i]##*/}
        [[ -e $zip ]] || download "${urls[i]}" "$zip" "${sizes[i]}"
        [[ -e $raw/${paths[i]} ]] || unpack "$zip" "${paths[i]}"
    done
    exec 9<&-
}

# Ask for the size of a zip.
bytes_at() { # URL PATH
    local answer size
    answer=$(curl --fail --silent --show-error --location --head --retry 3 --connect-timeout 30 "$1" 2>&1) ||
        fail "$1: $(grep '^curl: ' <<<"$answer" | tail -n 1), expected $2 from there;\
 check the network, or put it into $raw yourself ($0 says more at its top)"
    size=$(awk 'tolower($1) == "content-length:" { size = $2 } END { printf "%.0f", size }' <<<"$answer")
    ((size)) || fail "$1: the server does not say how many bytes it has, expected a file; take another mirror"
    echo "$size"
}

download() { # URL FILE BYTES
    local part=$2.part have failed=0 code meter=--silent
    [[ ! -t 2 ]] || meter=--progress-bar
    say "downloading $1"
    until have=$(bytes "$part") && ((have == $3)); do
        ((failed < 5)) ||
            fail "$1: stopped after $have of $3 bytes, expected all; run the same command again to resume"
        # A larger part is of another file.
        ((have < $3)) || rm "$part"
        code=0
        # Not --retry, which starts at the first byte again.
        curl --fail --location $meter --show-error --connect-timeout 30 --speed-limit 1000 --speed-time 60 \
            --continue-at - --output "$part" "$1" || code=$?
        # The server cannot resume.
        ((code != 33)) || rm "$part"
        # A long download may break often, as long as it advances.
        if ((have && $(bytes "$part") > have)); then failed=0; else failed=$((failed + 1)); fi
        ((code == 0)) || sleep "$failed"
    done
    mv "$part" "$2"
}

# Unpack into another folder, and move what is complete.
unpack() { # ZIP PATH
    local fresh=$raw/.unpacking code=0
    say "unpacking $2"
    rm -rf "$fresh"
    unzip -q -o "$1" "$2*" -d "$fresh" </dev/null >/dev/null 2>&1 || code=$?
    # 1: with a warning.
    if ((code > 1)); then
        rm -rf "$fresh"
        fail "$1: unzip's status is $code, expected a whole zip that holds $2 and $(mb "$(bytes "$1")") free;\
 remove the zip if it is damaged, or free some space, and run the same command again"
    fi
    mkdir -p "$(dirname "$raw/$2")"
    mv "$fresh/$2" "$raw/$2"
    rm -rf "$fresh"
}

# Pack one of COCO's official splits; of the expected numbers, only this split's applies.
pack_coco() { # SPLIT IMAGES FOLDER CAPTIONS [options of captionscale pack ...]
    local split=$1 images=$2 folder=$raw/$3 captions=$raw/$4 options=()
    shift 4
    while (($#)); do
        if [[ $1 == --expect && $# -gt 1 ]]; then set -- "$1=$2" "${@:3}"; fi
        case $1 in
            --expect="$split"=*) images=${1#--expect="$split"=} ;;
            --expect=*=*) ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    captionscale pack coco --images "$folder" --captions "$captions" --split "$split" --out "$out" \
        --expect "$split=$images" ${options[@]+"${options[@]}"}
}

# An image in two of the official splits is a note, as the user cannot correct it.
verify() {
    captionscale verify "$out" --allow-leaks
}

if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
raw=$1 out=$2
shift 2
# Last on the PATH: the environment that `make install` puts into a checkout.
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
command -v captionscale >/dev/null ||
    fail "no command captionscale, expected it on the PATH; activate its environment, or install it"
