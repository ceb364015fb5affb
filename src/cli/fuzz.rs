//! Bodies of the fuzz targets in `tests/fuzz` for what the command line reads; see `pagecopy::fuzz`.

use pageferry::transport::uri::Uri;

use super::api::Request;
use super::trace::Trace;

/// Any bytes as a line of a control socket: an error, or a request that is written to be read alike.
pub fn control_request(bytes: &[u8]) {
    let Ok(request) = Request::parse(bytes) else { return };
    let line = serde_json::to_vec(&request).expect("a request can be written");
    let again = Request::parse(&line).expect("what was written can be read");
    assert_eq!(again, request);
}

/// Any bytes as the file of a trace: an error, or intervals that the file has room for, of pages that the guest has.
pub fn trace(bytes: &[u8]) {
    let Ok(trace) = Trace::decode(bytes) else { return };
    let entries: usize = trace.intervals.iter().map(|interval| interval.written.len()).sum();
    assert_eq!(bytes.len(), 32 + 8 * trace.intervals.len() + 12 * entries);
    assert!(trace.pages() > 0 && !trace.took().is_zero());
    for interval in &trace.intervals {
        assert!(interval.written.is_sorted_by(|a, b| a.0 < b.0));
        assert!(interval.written.iter().all(|&(chunk, pages)| chunk < trace.chunks && pages != 0));
    }
}

/// Any text as an address: an error, or an address that is written to be read alike.
pub fn uri(bytes: &[u8]) {
    let Ok(Ok(uri)) = std::str::from_utf8(bytes).map(str::parse::<Uri>) else { return };
    assert_eq!(uri.to_string().parse::<Uri>().as_ref(), Ok(&uri), "written as {uri}");
}

#[cfg(test)]
mod tests {
    use testkit::replay;

    #[test]
    fn control_request() {
        replay("control_request", 4000, super::control_request);
    }

    #[test]
    fn trace() {
        replay("trace", 4000, super::trace);
    }

    #[test]
    fn uri() {
        replay("uri", 4000, super::uri);
    }
}
