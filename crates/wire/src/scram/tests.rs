use super::*;

fn exchange(
    verifier: Verifier,
    credential: Credential,
    client: Binding,
    end_point: Option<Vec<u8>>,
) -> Result<Keys, ScramError> {
    let (mechanism, first, state) = ClientFirst::start(credential, client, "clientnonce".into());
    let server = ServerStart::new(verifier, "servernonce".into(), end_point);
    let (challenge, server) = server.on_client_first(mechanism.as_bytes(), first.as_bytes())?;
    let (proof, state) = state.on_server_first(challenge.as_bytes())?;
    let (signature, keys) = server.on_client_final(proof.as_bytes())?;
    state.on_server_final(signature.as_bytes())?;
    Ok(keys)
}

fn verifier() -> Verifier {
    Verifier::of_password("sesame", b"saltsaltsaltsalt", NonZeroU32::new(4096).unwrap())
}

fn password(text: &str) -> Credential {
    Credential::Password(Secret::new(text))
}

#[test]
fn the_exchange_of_rfc_7677_gives_its_proof_and_signature() {
    let (_, first, client) =
        ClientFirst::start(password("pencil"), Binding::None, "rOprNGfwEbeRWgbNEkqO".into());
    assert_eq!(first, "n,,n=,r=rOprNGfwEbeRWgbNEkqO");
    // The RFC's client names its user; PostgreSQL's clients leave it empty, so the test puts it in.
    let client = ClientFirst { first_bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".into(), ..client };
    let challenge =
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    let (proof, client) = client.on_server_first(challenge).unwrap();
    assert!(proof.ends_with(",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="), "{proof}");
    client.on_server_final(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap();
}

#[test]
fn a_verifier_reads_back_what_it_writes() {
    let text = verifier().to_string();
    assert_eq!(Verifier::read(&text), Some(verifier()));
    assert_eq!(Verifier::read("md5aabbccddeeff00112233445566778899"), None);
    assert_eq!(Verifier::read("SCRAM-SHA-256$0:AAAA$AAAA:AAAA"), None);
}

#[test]
fn the_server_learns_keys_that_log_in_elsewhere() {
    let keys = exchange(verifier(), password("sesame"), Binding::None, None).unwrap();
    let again = exchange(verifier(), Credential::Keys(keys.clone()), Binding::None, None);
    assert_eq!(again, Ok(keys));
}

#[test]
fn a_wrong_password_is_refused_and_reveals_no_keys() {
    let result = exchange(verifier(), password("simsim"), Binding::None, None);
    assert_eq!(result, Err(ScramError::WrongPassword));
}

#[test]
fn an_unknown_user_fails_as_a_wrong_password_does() {
    let mock = Verifier::mock(b"secret of this process", b"nobody");
    assert_eq!(mock, Verifier::mock(b"secret of this process", b"nobody"));
    let result = exchange(mock, password("sesame"), Binding::None, None);
    assert_eq!(result, Err(ScramError::WrongPassword));
}

#[test]
fn the_channel_is_bound_when_both_ends_see_the_same_certificate() {
    let hash = vec![7; 32];
    let bound = Binding::EndPoint(hash.clone());
    assert!(exchange(verifier(), password("sesame"), bound.clone(), Some(hash)).is_ok());
    let other = exchange(verifier(), password("sesame"), bound.clone(), Some(vec![8; 32]));
    assert_eq!(other, Err(ScramError::ChannelBinding));
    let none = exchange(verifier(), password("sesame"), bound, None);
    assert_eq!(none, Err(ScramError::ChannelBinding));
}

#[test]
fn a_downgrade_of_the_channel_binding_is_noticed() {
    let stripped = exchange(verifier(), password("sesame"), Binding::Unoffered, Some(vec![7; 32]));
    assert_eq!(stripped, Err(ScramError::ChannelBinding));
    assert!(exchange(verifier(), password("sesame"), Binding::Unoffered, None).is_ok());
}

#[test]
fn a_server_without_the_verifier_is_noticed() {
    let (_, _, client) = ClientFirst::start(password("sesame"), Binding::None, "abc".into());
    let (_, client) = client.on_server_first(b"r=abcdef,s=AAAA,i=1").unwrap();
    let error = client.on_server_final(b"v=AAAA").unwrap_err();
    assert_eq!(error, ScramError::ServerSignature);
}

#[test]
fn a_server_that_asks_for_endless_work_is_refused() {
    let (_, _, client) = ClientFirst::start(password("sesame"), Binding::None, "abc".into());
    let error = client.on_server_first(b"r=abcdef,s=AAAA,i=4000000000").unwrap_err();
    assert_eq!(error, ScramError::Iterations(4_000_000_000));
}

#[test]
fn malformed_messages_are_refused_without_a_panic() {
    for message in
        ["", ",", "n,,", "n,,n=", "n,,n=,r=", "p=x,,n=,r=a", "n,a=b,n=,r=a", "n,,m=x,n=,r=a"]
    {
        let server = ServerStart::new(verifier(), "s".into(), None);
        assert!(
            server.on_client_first(MECHANISM.as_bytes(), message.as_bytes()).is_err(),
            "{message}"
        );
    }
    for message in
        ["", "c=", "c=biws", "c=biws,r=as", "c=biws,r=as,p=", "c=biws,r=as,p=AAAA", "c=!,r=as,p=A"]
    {
        let server = ServerStart::new(verifier(), "s".into(), None);
        let (_, server) = server.on_client_first(MECHANISM.as_bytes(), b"n,,n=,r=a").unwrap();
        assert!(server.on_client_final(message.as_bytes()).is_err(), "{message}");
    }
}

#[test]
fn secrets_are_not_printed() {
    let shown = format!("{:?} {:?}", verifier(), password("sesame"));
    assert_eq!(shown, "Verifier(..) Password(Secret(..))");
}
