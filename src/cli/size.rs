//! Sizes on the command line: bytes with a binary suffix.

/// Reads `4096`, `64K`, `256M`, `16G`, `1T` (powers of 1024) as bytes.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        other => return Err(format!("unknown unit {other:?}; use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a number such as 256M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size does not fit into 64 bits".into())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes() {
        assert_eq!(parse("256M"), Ok(256 << 20));
        assert_eq!(parse("1GiB"), Ok(1 << 30));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("2kb"), Ok(2048));
        for bad in ["", "M", "-1", "1.5G", "3X", "99999999T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
