#!/bin/sh
# Verify a postback: its body on standard input, its three headers as arguments.
# usage: verify.sh <webhook-id> <webhook-timestamp> <webhook-signature> < body
set -eu
case $2 in '' | *[!0-9]*) echo 'no timestamp' >&2; exit 1 ;; esac # some shells execute what is in $((...))
key=$(printf %s "${POSTBACK_SECRET#whsec_}" | base64 -d | od -An -v -tx1 | tr -d ' \n')
wanted=$({ printf '%s.%s.' "$1" "$2"; cat; } |
    openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | base64)

age=$(($(date +%s) - $2))
[ "${age#-}" -le 300 ] || { echo 'too old' >&2; exit 1; }
case " $3 " in
    *" v1,$wanted "*) echo verified ;;
    *) echo 'wrong signature' >&2; exit 1 ;;
esac
