"""Made-up personal data of every kind, and what only looks like it."""

from __future__ import annotations

import hashlib
import random
import string
import uuid

import phonenumbers
from phonenumbers import PhoneNumberFormat, PhoneNumberType
from stdnum import iban, luhn

WORDS = ("river", "stone", "meeting", "please", "about", "the", "order", "see", "with", "later", "invoice", "parcel")


def _chars(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def email(rng: random.Random) -> str:
    name = rng.choice(("john.doe", "anna", "m_weber", "a.b-c", "sales+eu", "jürgen", "x")) + rng.choice(
        ("", str(rng.randint(1, 99)))
    )
    return f"{name}@{rng.choice(('example', 'mail.uni-bonn', 'my-shop', 'post9'))}.{rng.choice(('com', 'de', 'co.uk', 'museum'))}"


def phone(rng: random.Random) -> str:
    region = rng.choice(("US", "GB", "DE", "FR", "JP", "BR"))
    kind = rng.choice((PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE))
    number = phonenumbers.example_number_for_type(region, kind)
    forms = [PhoneNumberFormat.INTERNATIONAL, PhoneNumberFormat.E164]
    if region in ("US", "GB", "DE"):
        forms.append(PhoneNumberFormat.NATIONAL)
    written = phonenumbers.format_number(number, rng.choice(forms))
    return written if " " in written or "+" in written or "-" in written else f"phone {written}"


def card(rng: random.Random) -> str:
    prefix, length = rng.choice(
        (("4", 16), ("4", 13), ("51", 16), ("2720", 16), ("37", 15), ("6011", 16), ("3528", 16), ("36", 14))
    )
    body = prefix + _chars(rng, string.digits, length - len(prefix) - 1)
    number = body + luhn.calc_check_digit(body)
    separator = rng.choice(("", " ", "-"))
    return separator.join(number[i : i + 4] for i in range(0, length, 4))


def account(rng: random.Random) -> str:
    country, digits = rng.choice((("DE", 18), ("AT", 16), ("CH", 17), ("PT", 21)))
    body = _chars(rng, string.digits, digits)
    if country == "PT":  # has check digits of its own
        country, body = "GB", _chars(rng, string.ascii_uppercase, 4) + body[:14]
    number = country + iban.calc_check_digits(country + "00" + body) + body
    return number if rng.random() < 0.5 else " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def secret(rng: random.Random) -> str:
    letters, base64 = string.ascii_letters + string.digits, string.ascii_letters + string.digits + "+/"
    lines = "\n".join(_chars(rng, base64, 64) for _ in range(4))
    return rng.choice(
        (
            "AKIA" + _chars(rng, string.ascii_uppercase + string.digits, 16),
            "ghp_" + _chars(rng, letters, 36),
            "sk-proj-" + _chars(rng, letters, 40),
            "sk_live_" + _chars(rng, letters, 24),
            "xoxb-" + _chars(rng, string.digits, 12) + "-" + _chars(rng, letters, 20),
            "AIza" + _chars(rng, letters, 35),
            f"eyJ{_chars(rng, letters, 20)}.eyJ{_chars(rng, letters, 40)}.{_chars(rng, letters, 43)}",
            f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----",
            f"-----BEGIN OPENSSH PRIVATE KEY-----\n{lines}\n-----END OPENSSH PRIVATE KEY-----",
        )
    )


POSITIVES = {"email": email, "phone": phone, "card": card, "iban": account, "secret": secret}


def negative(rng: random.Random) -> str:
    """Version numbers, hashes, dates, orders, addresses of machines, code."""
    order = "4" + _chars(rng, string.digits, 15)
    while luhn.is_valid(order):
        order = "4" + _chars(rng, string.digits, 15)
    wrong = account(rng)
    wrong = wrong[:2] + f"{(int(wrong[2:4]) + 1) % 97:02d}" + wrong[4:]
    return rng.choice(
        (
            f"v{rng.randint(0, 20)}.{rng.randint(0, 99)}.{rng.randint(0, 999)}",
            f"react@{rng.randint(1, 18)}.2.0",
            hashlib.sha256(str(rng.random()).encode()).hexdigest(),
            hashlib.md5(str(rng.random()).encode()).hexdigest(),
            str(uuid.UUID(int=rng.getrandbits(128))),
            f"20{rng.randint(10, 29)}-0{rng.randint(1, 9)}-{rng.randint(10, 28)}T10:{rng.randint(10, 59)}:33Z",
            f"20{rng.randint(10, 29)}-0{rng.randint(1, 9)}-{rng.randint(10, 28)}",
            f"order {order}",
            f"order #{rng.randint(10**9, 10**10 - 1)}",
            wrong,
            f"192.168.{rng.randint(0, 255)}.{rng.randint(0, 255)}",
            "@app.route('/index')",
            f"token = get_next_token(stream, {rng.randint(1, 9)})",
            f"{rng.random():.16f}",
            f"${rng.randint(1, 999)},{rng.randint(100, 999)}.{rng.randint(10, 99)}",
            f"ISBN 978-3-16-1{rng.randint(10000, 99999)}-0",
        )
    )


def sentence(rng: random.Random, item: str) -> tuple[str, int, int]:
    """The item among words, and where it stands."""
    before = " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + rng.choice((" ", ": ", " (", "\n"))
    after = rng.choice((" ", ", ", ". ", ")\n", "\n")) + " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
    return before + item + after, len(before), len(before) + len(item)
