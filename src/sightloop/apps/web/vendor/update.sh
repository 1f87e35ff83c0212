#!/bin/sh
# Fetches the page's libraries at the versions of README.md; needs npm. Run it in this folder.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fetch() { # package version -> folder of its files
    (cd "$work" && npm pack --silent "$1@$2" >name && mkdir -p "$3" && tar -xzf "$(cat name)" -C "$3")
}
copy() {
    sed -e 's#from"preact/hooks"#from"./hooks.js"#g' -e 's#from"preact"#from"./preact.js"#g' \
        -e 's#from"@preact/signals-core"#from"./signals-core.js"#g' -e 's#//\# sourceMappingURL=.*##' "$work/$1" >"$2"
}
fetch preact 11.2.0 preact
fetch @preact/signals-core 1.14.5 core
fetch @preact/signals 2.11.4 signals
fetch htm 3.1.1 htm
copy preact/package/dist/preact.mjs preact.js
copy preact/package/hooks/dist/hooks.mjs hooks.js
copy core/package/dist/signals-core.mjs signals-core.js
copy signals/package/dist/signals.mjs signals.js
copy htm/package/dist/htm.mjs htm.js
cp "$work/preact/package/LICENSE" licenses/preact.txt
cp "$work/signals/package/LICENSE" licenses/signals.txt
cp "$work/htm/package/LICENSE" licenses/htm.txt
sha256sum -- *.js >checksums.txt
