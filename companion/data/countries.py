"""Facts about the countries of the world, as records and as triples.

The records are those of the wheel countryinfo (MIT), read as JSON without importing it. They were collected
by its authors from several sources, are a few years old and not free of errors: data to retrieve from, not
to settle a dispute with.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from companion.data.assets import asset_path

RELATIONS = ("capital", "region", "subregion", "currency", "border", "demonym", "domain", "calling_code")


@dataclass(frozen=True, slots=True)
class Country:
    """One country or territory.

    Attributes:
        code: three letters, ISO 3166-1.
        name, capital, region, subregion, demonym: in English; the empty string where there is none.
        currencies: codes of three letters, ISO 4217.
        borders: codes of the neighbours by land.
        domains: top-level domains, with their dot.
        calling_codes: digits, without plus sign.
        population: persons; None where unknown.
        area: square kilometres; None where unknown.
        translations: name by language code ("de", "es", "fr", "it", "ja").
    """

    code: str
    name: str
    capital: str
    region: str
    subregion: str
    demonym: str
    currencies: tuple[str, ...]
    borders: tuple[str, ...]
    domains: tuple[str, ...]
    calling_codes: tuple[str, ...]
    population: int | None
    area: float | None
    translations: dict[str, str]


@cache
def load_countries() -> tuple[Country, ...]:
    """One record for each code, in the order of their names; of two with one code, the one with a population.

    Raises:
        FileNotFoundError: the wheel is not installed (says the command that installs it).
        ValueError: its files are not the pinned ones.
    """
    folder = asset_path("countries")
    records = sorted(
        (_read(path) for path in folder.glob("*.json")),
        key=lambda country: (country.population is not None, country.name),
    )
    by_code = {country.code: country for country in records}
    return tuple(sorted(by_code.values(), key=lambda country: country.name))


def country_triples(relations: tuple[str, ...] = RELATIONS) -> list[tuple[str, str, str]]:
    """The records as (country, relation, value): one triple for each value, countries by their names.

    Args:
        relations: some of `RELATIONS`.
    """
    if unknown := sorted(set(relations) - set(RELATIONS)):
        raise ValueError(f"relations must be some of {', '.join(RELATIONS)}, got {', '.join(unknown)}")
    countries = load_countries()
    names = {country.code: country.name for country in countries}
    values = {
        "capital": lambda country: (country.capital,),
        "region": lambda country: (country.region,),
        "subregion": lambda country: (country.subregion,),
        "currency": lambda country: country.currencies,
        "border": lambda country: [names[code] for code in country.borders if code in names],
        "demonym": lambda country: (country.demonym,),
        "domain": lambda country: country.domains,
        "calling_code": lambda country: country.calling_codes,
    }
    return [
        (country.name, relation, value)
        for country in countries
        for relation in relations
        for value in values[relation](country)
        if value
    ]


def _read(path: Path) -> Country:
    record = json.loads(path.read_text(encoding="utf-8"))

    def texts(key: str) -> tuple[str, ...]:
        return tuple(text for text in record.get(key) or () if text)

    capital = record.get("capital") or ""
    return Country(
        code=record["ISO"]["alpha3"],
        name=record["name"],
        capital=capital if isinstance(capital, str) else capital[0],
        region=record.get("region") or "",
        subregion=record.get("subregion") or "",
        demonym=record.get("demonym") or "",
        currencies=texts("currencies"),
        borders=texts("borders"),
        domains=texts("tld"),
        calling_codes=texts("callingCodes"),
        population=record.get("population"),
        area=record.get("area"),
        translations={code: name for code, name in (record.get("translations") or {}).items() if name},
    )
