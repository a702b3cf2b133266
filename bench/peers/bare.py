"""A Bottle route on waitress that does nothing: what the service's 200 is held against."""

import sys

import bottle


@bottle.post("/process")
def process() -> dict[str, str]:
    return {"state": "accepted"}


if __name__ == "__main__":
    bottle.run(host="127.0.0.1", server="waitress", port=int(sys.argv[1]))
