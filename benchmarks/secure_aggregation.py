"""What a secure sum costs: a site's and the coordinator's seconds, and bytes a parameter, beside a plain sum.

    python benchmarks/secure_aggregation.py --sites 10 --params-m 4 --dropout 0.2 [--repeat 3] [--json]

Every site runs the whole protocol of `privacy/secure_aggregation` in this process, one after the other: encoding to
fixed point, masks, and its part of every message. Sites that drop out do so after they have handed out their shares,
which is the dearest time: their pair masks must be taken off the sum one by one.

    bit_exact         the sum in the ring is that of the encoded rows, bit for bit
    site_s            a site's seconds: keys, shares, encoding and masks, consent, reveal; mean
    masks_s           of these, making and adding the masks
    coordinator_s     the coordinator's seconds: checking, adding rows, taking the masks off
    plain_s           the same rows added in the clear, in this run
    site_over_encode  a site's seconds to those of encoding alone
    bytes_per_param   what a site sends, all messages, to its number of parameters
    flower_masks      seconds in which Flower's own code (`secaggplus_utils.pseudo_rand_gen`) makes and adds the masks
                      that one site needs, to ours; null without --flower PYTHON, an interpreter of an environment of
                      its own in which flwr is installed, since its requirements and ours do not go together

With --homomorphic, which needs the package tenseal, the same rows are also added as ciphertexts
(`privacy/homomorphic.py`), each figure of which stands beside that of the masks:

    he_exact            the decrypted sum is that of the encoded rows, bit for bit
    he_site_s           a site's seconds: encoding and encryption; mean
    he_decrypt_s        further seconds of the one site that decrypts
    he_coordinator_s    the coordinator's: reading and adding ciphertexts
    he_bytes_per_param  what a site sends, to its number of parameters
    he_…_over_masks     site_s, coordinator_s and bytes_per_param so, to those of the masks
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from commonweight.errors import CommonweightError
from commonweight.privacy.homomorphic import Adder, Keyholder
from commonweight.privacy.secure_aggregation.collector import Collector
from commonweight.privacy.secure_aggregation.fixed_point import FixedPoint
from commonweight.privacy.secure_aggregation.masks import Expander
from commonweight.privacy.secure_aggregation.messages import Session
from commonweight.privacy.secure_aggregation.party import Party

_KINDS = 4  # rows that sites take turns with: memory, not time, would be the limit of one each


def measured(num_sites: int, num_params: int, dropout: float) -> dict[str, float]:
    """One secure sum's figures."""
    sites = tuple(f"site-{index:03d}" for index in range(num_sites))
    keys = {site: Ed25519PrivateKey.generate() for site in sites}
    public = {site: key.public_key() for site, key in keys.items()}

    def verify(site: str, message: bytes, signature: bytes) -> bool:
        try:
            public[site].verify(signature, message)
        except InvalidSignature:
            return False
        return True

    draw = np.random.default_rng(0)
    values = [draw.standard_normal(num_params, dtype=np.float32) * 1e-3 for _ in range(_KINDS)]
    fixed, session = FixedPoint(0.01, num_sites), Session("benchmark", 1, 0, sites, lost=max(dropout, 0.1))
    dropped = set(sites[: int(dropout * num_sites)])
    clock = dict.fromkeys(("site", "encode", "masks", "coordinator", "plain"), 0.0)
    sent = 0

    def timed(name: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        clock[name] += time.perf_counter() - began
        return result

    collector = Collector(session, verify=verify)
    parties = {site: Party(session, site, sign=keys[site].sign, verify=verify) for site in sites}
    for party in parties.values():
        advert = timed("site", party.advertise)
        sent += len(advert.channel + advert.pair + advert.commitment + advert.signature)
        timed("coordinator", collector.advert, advert)
    adverts = timed("coordinator", collector.close_adverts)
    for site, party in parties.items():
        sealed = timed("site", party.share, adverts)
        sent += sum(map(len, sealed.values()))
        timed("coordinator", collector.shares, site, sealed)
    boxes = timed("coordinator", collector.close_shares)
    total, plain = np.zeros(num_params, dtype=np.uint32), np.zeros(num_params, dtype=np.uint32)
    row = np.empty(num_params, dtype=np.uint32)
    for index, (site, party) in enumerate(parties.items()):
        if site in dropped:
            continue
        timed("encode", fixed.encode, values[index % _KINDS], row)
        timed("plain", np.add, plain, row, plain)
        timed("masks", party.mask, boxes[site], row)
        sent += row.nbytes
        timed("coordinator", collector.row, site, row, total)
    survivors = timed("coordinator", collector.close_rows)
    for site in survivors:
        signature = timed("site", parties[site].consent, survivors)
        sent += len(signature)
        timed("coordinator", collector.consent, site, signature)
    consents = timed("coordinator", collector.close_consents)
    for site in survivors:
        reveal = timed("site", parties[site].reveal, consents)
        sent += sum(map(len, (*reveal.own.values(), *reveal.pair.values())))
        timed("coordinator", collector.reveal, reveal)
    timed("coordinator", collector.open, total)
    there, every = len(survivors), clock["encode"] + clock["masks"]
    return {
        "bit_exact": float((total == plain).all()),
        "site_s": clock["site"] / num_sites + every / there,
        "encode_s": clock["encode"] / there,
        "masks_s": clock["masks"] / there,
        "coordinator_s": clock["coordinator"],
        "plain_s": clock["plain"],
        "bytes_per_param": sent / there / num_params,
    }


def encrypted(num_sites: int, num_params: int, dropout: float) -> dict[str, float]:
    """The same sum by homomorphic encryption."""
    draw, fixed = np.random.default_rng(0), FixedPoint(0.01, num_sites)
    values = [draw.standard_normal(num_params, dtype=np.float32) * 1e-3 for _ in range(_KINDS)]
    row, plain = np.empty(num_params, dtype=np.uint32), np.zeros(num_params, dtype=np.uint32)
    holder, adder, site_s, coordinator_s, sent = Keyholder(), Adder(), 0.0, 0.0, 0
    there = range(int(dropout * num_sites), num_sites)
    for index in there:
        began = time.perf_counter()
        fixed.encode(values[index % _KINDS], row)
        ciphertexts = holder.encrypt(row)
        given = time.perf_counter()
        adder.add(ciphertexts)
        coordinator_s += time.perf_counter() - given
        site_s += given - began
        plain += row
        sent += sum(map(len, ciphertexts))
    began = time.perf_counter()
    total = adder.total()
    added = time.perf_counter()
    found = holder.decrypt(total)
    return {
        "he_exact": float((found == plain).all()),
        "he_site_s": site_s / len(there),
        "he_decrypt_s": time.perf_counter() - added,
        "he_coordinator_s": coordinator_s + added - began,
        "he_bytes_per_param": sent / len(there) / num_params,
    }


_FLOWER = """
import sys, time
import numpy as np
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
count, params = map(int, sys.argv[1:])
total = np.zeros(params, dtype=np.int64)
began = time.perf_counter()
for seed in range(count):
    total += pseudo_rand_gen(seed.to_bytes(32, "big"), 1 << 32, [(params,)])[0]
total %= 1 << 32
print(time.perf_counter() - began)
"""


def compared(python: str, num_neighbours: int, num_params: int) -> float:
    """Flower's seconds for one site's masks, to those of `Expander`; each makes a mask for every neighbour and one of
    its own, and adds them up.

    Raises:
        OSError, subprocess.SubprocessError: that interpreter, or flwr in it, cannot be had.
    """
    count = num_neighbours + 1
    command = [python, "-W", "ignore", "-c", _FLOWER, str(count), str(num_params)]
    theirs = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    expander, row = Expander(), np.zeros(num_params, dtype=np.uint32)
    began = time.perf_counter()
    for seed in range(count):
        expander.add(row, seed.to_bytes(16, "big"))
    return theirs / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--params-m", type=float, default=4.0, help="Millions of parameters.")
    parser.add_argument("--dropout", type=float, default=0.0, help="Share of the sites that drop out.")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--flower", metavar="PYTHON", help="Also make masks by flwr's code, with this interpreter.")
    parser.add_argument("--homomorphic", action="store_true", help="Also add ciphertexts; needs the package tenseal.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    num_params = int(given.params_m * 1e6)
    if num_params < 1 or given.repeat < 1 or not 0 <= given.dropout < 1:
        parser.error("--params-m and --repeat must be positive, --dropout from 0 to below 1")
    try:
        runs = [measured(given.sites, num_params, given.dropout) for _ in range(given.repeat)]
        if given.homomorphic:
            runs = [run | encrypted(given.sites, num_params, given.dropout) for run in runs]
    except CommonweightError as error:
        parser.error(error.message)
    figures: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    figures["bit_exact"] = all(run["bit_exact"] for run in runs)
    figures["site_over_encode"] = figures["site_s"] / figures["encode_s"]
    try:
        figures["flower_masks"] = compared(given.flower, given.sites - 1, num_params) if given.flower else None
    except (OSError, subprocess.SubprocessError) as error:
        parser.error(f"--flower: {error}")
    if given.homomorphic:
        figures["he_exact"] = all(run["he_exact"] for run in runs)
        for key in ("site_s", "coordinator_s", "bytes_per_param"):
            figures[f"he_{key}_over_masks"] = figures[f"he_{key}"] / figures[key]
    figures |= {"sites": given.sites, "params": num_params, "dropout": given.dropout}
    if given.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        print(f"{key:18} {value:.6g}" if isinstance(value, float) else f"{key:18} {value}")


if __name__ == "__main__":
    main()
