//! Certificates of every kind: the right answer for each, on both sides, and soon.

use std::time::{Duration, Instant};

use rcgen::ExtendedKeyUsagePurpose;

use crate::common::{Image, Job, MIB, send, turn};
use crate::lab::{Authority, Keys, Wanted, assert_serves, recv};

/// Far less than any time-out of either side (10 s), with slack for a busy machine.
const SOON: Duration = Duration::from_secs(5);

/// Whose certificate is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Servers,
    Clients,
}

/// Who has signed it.
#[derive(Clone, Copy, Debug)]
enum Signer {
    /// Whom the other side trusts.
    Trusted,
    Stranger,
    /// One whom the trusted one has signed, and who is not shown.
    Between,
}

/// Sends where one side's certificate is no good: what the source and the destination say. Then a good source is served.
fn refused(whose: Whose, signer: Signer, wanted: &Wanted, source: &str, destination: &str) {
    let _turn = turn();
    let (authority, good) = (Authority::new("the authority"), Wanted::good());
    let bad = match signer {
        Signer::Trusted => None,
        Signer::Stranger => Some(Authority::new("another")),
        Signer::Between => Some(authority.intermediate("between")),
    };
    let keys = |side: Whose, name: &str| {
        let keys = Keys::trusting(&authority);
        if side == whose {
            keys.with(name, bad.as_ref().unwrap_or(&authority), wanted, "")
        } else {
            keys.with(name, &authority, &good, "")
        }
    };
    let (server, client) = (keys(Whose::Servers, "server"), keys(Whose::Clients, "client"));
    let job = Job::new(Image::Mixed, MIB);
    let mut listening = recv(&job, &server, &[]);
    let begun = Instant::now();
    let sent = send(&listening.uri, &job.from, &["--tls-dir", client.text()]).wait();
    assert!(begun.elapsed() < SOON, "{whose:?} {signer:?} {wanted:?}: {:?}", begun.elapsed());
    assert_ne!(sent.code, Some(0), "{sent:?}");
    sent.says(&[source]);
    listening.ferry.wait_stderr(destination);
    // Both are read anew for the next connection.
    for (side, keys) in [("server", &server), ("client", &client)] {
        let (certificate, key) = authority.sign(&good);
        std::fs::write(keys.file(&format!("{side}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(keys.file(&format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }
    assert_serves(&job, listening, &client);
}

/// The authority's own certificate is no good.
fn refused_for(whose: Whose, wanted: &Wanted, source: &str, destination: &str) {
    refused(whose, Signer::Trusted, wanted, source, destination);
}

#[test]
fn authorities_that_are_not_trusted() {
    let distrusted = "is not signed by an authority that this side trusts";
    let told = "the other side does not trust the authority that signed this side's certificate";
    for signer in [Signer::Stranger, Signer::Between] {
        refused(Whose::Servers, signer, &Wanted::good(), distrusted, told);
        refused(Whose::Clients, signer, &Wanted::good(), told, distrusted);
    }
}

#[test]
fn certificates_out_of_their_time() {
    let expired = Wanted { from: -3, until: -1, ..Wanted::good() };
    let early = Wanted { from: 1, until: 3, ..Wanted::good() };
    let told = "this side's certificate has expired, or is not valid yet";
    refused_for(Whose::Servers, &expired, "the other side's certificate has expired", told);
    refused_for(Whose::Clients, &expired, told, "the other side's certificate has expired");
    refused_for(Whose::Servers, &early, "the other side's certificate is not valid yet", told);
    refused_for(Whose::Clients, &early, told, "the other side's certificate is not valid yet");
}

#[test]
fn certificates_for_another_name() {
    let told = "the other side refuses this side's certificate";
    for wanted in [
        Wanted { names: vec!["127.0.0.2"], ..Wanted::good() },
        Wanted { names: vec!["node7.lab"], ..Wanted::good() },
        // A name in the subject alone counts for nothing.
        Wanted { names: vec![], common_name: "127.0.0.1", ..Wanted::good() },
    ] {
        refused_for(Whose::Servers, &wanted, "the other side's certificate is for another name", told);
    }
}

#[test]
fn certificates_for_another_purpose() {
    let only = |purpose| Wanted { purpose: Some(purpose), ..Wanted::good() };
    let client = only(ExtendedKeyUsagePurpose::ClientAuth);
    refused_for(Whose::Servers, &client, "certificate is for another purpose", "the other side");
    let server = only(ExtendedKeyUsagePurpose::ServerAuth);
    refused_for(Whose::Clients, &server, "the other side", "certificate is for another purpose");
}

/// Chains, wildcards, names that are said, and addresses are all right.
#[test]
fn certificates_that_are_good() {
    let _turn = turn();
    let authority = Authority::new("the authority");
    let between = authority.intermediate("between");
    let named = |names: &[&'static str]| Wanted { names: names.to_vec(), ..Wanted::good() };
    for (signer, chain, wanted, hostname) in [
        (&authority, "", named(&["127.0.0.1"]), None),
        (&between, between.pem.as_str(), named(&["127.0.0.1"]), None),
        (&authority, "", named(&["*.nodes.lab", "10.0.0.9"]), Some("a.nodes.lab")),
        (&authority, "", named(&["node7.lab"]), Some("node7.lab")),
        (&authority, "", named(&["10.0.0.9"]), Some("10.0.0.9")),
    ] {
        let job = Job::new(Image::Mixed, MIB);
        let keys = Keys::trusting(&authority).with("server", signer, &wanted, chain);
        let keys = keys.with("client", signer, &Wanted::good(), chain);
        let listening = recv(&job, &keys, &[]);
        let mut args = vec!["--tls-dir", keys.text()];
        args.extend(hostname.iter().flat_map(|name| ["--tls-hostname", name]));
        send(&listening.uri, &job.from, &args).wait().code(0);
        listening.ferry.wait().code(0);
        job.assert_arrived();
    }
    // A wildcard is of one label.
    let keys = Keys::trusting(&authority).with("server", &authority, &named(&["*.nodes.lab"]), "");
    let keys = keys.with("client", &authority, &Wanted::good(), "");
    let job = Job::new(Image::Mixed, MIB);
    let listening = recv(&job, &keys, &[]);
    for name in ["a.b.nodes.lab", "nodes.lab"] {
        let sent =
            send(&listening.uri, &job.from, &["--tls-dir", keys.text(), "--tls-hostname", name]).wait();
        sent.says(&["is for another name"]);
    }
}

#[test]
fn only_those_who_may_send_do() {
    let _turn = turn();
    let authority = Authority::new("the authority");
    let named = |names: &[&'static str]| Wanted { names: names.to_vec(), ..Wanted::good() };
    let job = Job::new(Image::Mixed, MIB);
    let server = Keys::trusting(&authority).with("server", &authority, &Wanted::good(), "");
    let mut listening = recv(&job, &server, &["--tls-allow", "node1.lab", "--tls-allow", "node2.lab"]);
    let begun = Instant::now();
    let keys = Keys::trusting(&authority).with("client", &authority, &named(&["node3.lab"]), "");
    let sent = send(&listening.uri, &job.from, &["--tls-dir", keys.text()]).wait();
    sent.says(&["its certificate is for none of the names that may send: node1.lab, node2.lab"]);
    assert!(begun.elapsed() < SOON);
    listening.ferry.wait_stderr("its certificate is for none of the names that may send");
    let keys = Keys::trusting(&authority).with("client", &authority, &named(&["node2.lab"]), "");
    assert_serves(&job, listening, &keys);
}

#[test]
fn plain_and_tls_do_not_mix_and_say_so() {
    let _turn = turn();
    let keys = Keys::good();
    let job = Job::new(Image::Mixed, MIB);
    let mut listening = recv(&job, &keys, &[]);
    let begun = Instant::now();
    let sent = send(&listening.uri, &job.from, &[]).wait();
    assert_ne!(sent.code, Some(0));
    sent.says(&["it does not speak TLS, and this destination speaks nothing else"]);
    assert!(begun.elapsed() < SOON);
    listening.ferry.wait_stderr("it does not speak TLS");
    assert_serves(&job, listening, &keys);

    let file = job.to.to_str().unwrap();
    let mut plain = crate::common::Recv::start("tcp:127.0.0.1:0", ["--json", "--ram-file", file]);
    let begun = Instant::now();
    let sent = send(&plain.uri, &job.from, &["--tls-dir", keys.text()]).wait();
    assert_ne!(sent.code, Some(0));
    sent.says(&["the other side does not speak TLS"]);
    assert!(begun.elapsed() < SOON);
    plain.ferry.wait_stderr("it speaks TLS, and this destination does not");
}
