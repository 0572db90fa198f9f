//! Sizes and times as people write them: `10G`, `64KiB`, `1.5T`, `200ms`.
//!
//! `K M G T P E`, alone or as `KiB …`, are powers of 1024; `KB MB …` are powers of 1000. Letters
//! may be of either case, a space may precede the unit, a fraction is rounded down to bytes.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest text that is looked at, bytes.
const TEXT_BYTES_MAX: usize = 64;

/// Why a text is no size or time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{input}' is not a {what}: {reason}")]
pub struct UnitError {
    input: String,
    what: &'static str,
    reason: &'static str,
}

/// A number of bytes. Printed exactly, in the largest binary unit that needs at most two
/// decimals: `1.5TiB`, `4097B`. As JSON or TOML a number; text with a unit is read too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// Binary units, largest first, by their power of 1024.
const BINARY: [(&str, u32); 6] =
    [("EiB", 6), ("PiB", 5), ("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)];

impl ByteSize {
    /// Rounded to three or four digits, for tables: `9.31GiB`.
    pub fn approximate(self) -> String {
        let unit = BINARY.iter().find(|(_, power)| self.0 >= 1 << (10 * power));
        let Some((name, power)) = unit else { return format!("{}B", self.0) };
        let value = self.0 as f64 / (1_u64 << (10 * power)) as f64;
        let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        format!("{value:.decimals$}{name}")
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, power) in BINARY {
            let unit = 1_u128 << (10 * power);
            let hundredths = u128::from(self.0) * 100;
            if u128::from(self.0) < unit || !hundredths.is_multiple_of(unit) {
                continue;
            }
            let (whole, part) = (hundredths / unit / 100, hundredths / unit % 100);
            return f.pad(&match part {
                0 => format!("{whole}{name}"),
                _ if part.is_multiple_of(10) => format!("{whole}.{}{name}", part / 10),
                _ => format!("{whole}.{part:02}{name}"),
            });
        }
        f.pad(&format!("{}B", self.0))
    }
}

/// A decimal number as `digits / scale`, and the text after it.
fn split_number(text: &str) -> Result<(u128, u128, &str), &'static str> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) || fraction.contains('.') {
        return Err("it must begin with a number");
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > 12 || whole.len() > 20 {
        return Err("it has too many digits");
    }
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| "it is too large")?;
    let scale = fraction.chars().fold(1, |scale, _| scale * 10);
    Ok((digits, scale, unit.trim_start()))
}

fn parse_bytes(text: &str) -> Result<u64, &'static str> {
    let (digits, scale, unit) = split_number(text)?;
    let unit = unit.to_ascii_lowercase();
    let (letter, rest) = unit.split_at(unit.chars().next().map_or(0, char::len_utf8));
    let power = match letter {
        "" | "b" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        "e" => 6,
        _ => return Err("its unit must be one of K, M, G, T, P, E, KiB …, KB …"),
    };
    let multiple = match rest {
        "" | "ib" if power > 0 => 1_u128 << (10 * power),
        "b" if power > 0 => 1000_u128.pow(power),
        "" if scale == 1 => 1,
        "" => return Err("a byte has no parts"),
        _ => return Err("its unit must be one of K, M, G, T, P, E, KiB …, KB …"),
    };
    let bytes = digits.checked_mul(multiple).ok_or("it is too large")? / scale;
    u64::try_from(bytes).map_err(|_| "it is too large")
}

fn parse_nanos(text: &str) -> Result<u64, &'static str> {
    let (digits, scale, unit) = split_number(text)?;
    let multiple = match unit {
        "ns" => 1,
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        "" if digits == 0 => 1,
        _ => return Err("it needs a unit: ns, us, ms, s, m, h or d"),
    };
    let nanos = digits.checked_mul(multiple).ok_or("it is too large")? / scale;
    u64::try_from(nanos).map_err(|_| "it is too large")
}

fn parse<T>(
    input: &str,
    what: &'static str,
    parse: impl Fn(&str) -> Result<T, &'static str>,
) -> Result<T, UnitError> {
    let text = input.trim();
    let parsed = if text.len() > TEXT_BYTES_MAX { Err("it is too long") } else { parse(text) };
    let shown =
        || input.chars().take(TEXT_BYTES_MAX).collect::<String>().escape_debug().to_string();
    parsed.map_err(|reason| UnitError { input: shown(), what, reason })
}

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(s: &str) -> Result<Self, UnitError> {
        parse(s, "size", parse_bytes).map(Self)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a text such as \"10G\"")
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                let negative = |_| E::custom(format!("'{bytes}' is not a size: it is negative"));
                u64::try_from(bytes).map(ByteSize).map_err(negative)
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A length of time, as text with a unit: `5s`, `200ms`, `1.5h`. Printed exactly, in the largest
/// unit that divides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TimeSpan(pub Duration);

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        let units = [
            ("d", 86_400_000_000_000),
            ("h", 3_600_000_000_000),
            ("m", 60_000_000_000),
            ("s", 1_000_000_000),
            ("ms", 1_000_000),
            ("us", 1_000),
        ];
        let unit = units.iter().find(|(_, unit)| nanos > 0 && nanos.is_multiple_of(*unit));
        match unit {
            Some((name, unit)) => f.pad(&format!("{}{name}", nanos / unit)),
            None if nanos == 0 => f.pad("0s"),
            None => f.pad(&format!("{nanos}ns")),
        }
    }
}

impl FromStr for TimeSpan {
    type Err = UnitError;
    fn from_str(s: &str) -> Result<Self, UnitError> {
        parse(s, "time", parse_nanos).map(|nanos| Self(Duration::from_nanos(nanos)))
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("0", 0),
            ("7B", 7),
            ("10G", 10 << 30),
            ("64KiB", 64 << 10),
            ("64 kib", 64 << 10),
            ("1.5T", 3 << 39),
            ("1KB", 1000),
            ("2.5GB", 2_500_000_000),
            ("0.1G", 107_374_182),
            ("15E", 15 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for (text, reason) in [
            ("", "must begin with a number"),
            ("G", "must begin with a number"),
            ("-1", "must begin with a number"),
            ("1.", "must begin with a number"),
            ("1.2.3", "must begin with a number"),
            ("10X", "unit must be one of"),
            ("10Gb/s", "unit must be one of"),
            ("10KiBs", "unit must be one of"),
            ("1ß", "unit must be one of"),
            ("16E", "too large"),
            ("99999999999999999999999", "too many digits"),
            ("1.5", "a byte has no parts"),
        ] {
            let error = text.parse::<ByteSize>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(&format!("'{text}'")), "{error}");
        }
        assert_eq!(ByteSize(3 << 39).to_string(), "1.5TiB");
        assert_eq!(ByteSize(4097).to_string(), "4097B");
        assert_eq!(ByteSize(0).to_string(), "0B");
        assert_eq!(ByteSize(10_000_000_000).approximate(), "9.31GiB");
        assert_eq!(ByteSize(1000).approximate(), "1000B");
    }

    #[test]
    fn times() {
        let ms = |ms| Ok(TimeSpan(Duration::from_millis(ms)));
        assert_eq!("5s".parse(), ms(5000));
        assert_eq!("200ms".parse(), ms(200));
        assert_eq!("1.5m".parse(), ms(90_000));
        let error = "5".parse::<TimeSpan>().unwrap_err().to_string();
        assert_eq!(error, "'5' is not a time: it needs a unit: ns, us, ms, s, m, h or d");
        assert_eq!(serde_json::from_str::<TimeSpan>("\"2h\"").unwrap().to_string(), "2h");
    }

    #[test]
    fn serde_takes_numbers_and_text() {
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap(), ByteSize(4096));
        assert_eq!(serde_json::from_str::<ByteSize>("\"4K\"").unwrap(), ByteSize(4096));
        assert!(serde_json::from_str::<ByteSize>("-1").is_err());
        assert_eq!(serde_json::to_string(&ByteSize(4096)).unwrap(), "4096");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(bytes: u64, shift in 0..64_u32, nanos: u64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let span = TimeSpan(Duration::from_nanos(nanos >> shift << (shift / 2)));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,80}") {
            text.parse::<ByteSize>().ok();
            text.parse::<TimeSpan>().ok();
        }
    }
}
