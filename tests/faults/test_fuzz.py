"""H08 in small: mutations of valid requests, by the same means as `./run fuzz`."""

from tests.faults.world import leaving
from tests.soak import fuzz


def test_h08_no_mutation_of_a_request_is_more_than_a_refusal(shared):
    host, _, port = shared.base_url.removeprefix("http://").partition(":")
    one = fuzz.Fuzz((host, int(port)), "suite")

    one.send(range(500))

    assert one.faults == []
    assert one.sent == 500
    with leaving(shared, 0):
        pass
