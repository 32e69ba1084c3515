package transport

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"kraken/proto/config"
)

// ErrNoProgress is a request that was given up because no byte moved for the progress timeout.
var ErrNoProgress = errors.New("no progress")

// DefaultProgressTimeout and DefaultDialTimeout are those of ClientConfig where none is set.
const (
	DefaultProgressTimeout = 30 * time.Second
	DefaultDialTimeout     = time.Second
)

// ClientConfig configures how a role speaks to the others.
type ClientConfig struct {
	// PEM file of trusted roots, default the system's; read again when it changes, like all files here
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"` // PEM file; with key: mutual TLS
	Key  string `yaml:"key"`  // PEM file
	// DeniedSerials is a file of serial numbers, hexadecimal, one a line: servers with such certificates are not spoken
	// to.
	DeniedSerials string `yaml:"denied_serials"`
	// DialTimeout bounds the making of a connection, default 1s.
	DialTimeout config.Duration `yaml:"dial_timeout"`
	// ProgressTimeout is how long a request may go without a byte moving in either direction, default 30s. There is no
	// limit on its whole length.
	ProgressTimeout config.Duration `yaml:"progress_timeout"`
	// From is the address that connections are made from where that works, default whatever the system chooses. Set by
	// the role.
	From netip.Addr `yaml:"-"`
	// Dial makes connections, nil is the operating system's. Set by tests, and by who looks at addresses first.
	Dial DialFunc `yaml:"-"`
	// Proxy returns the proxy of a request; nil, or a nil URL, is none. Set by who speaks to hosts outside the cluster.
	Proxy func(*http.Request) (*url.URL, error) `yaml:"-"`

	every lookEvery // set by tests
}

// DialFunc makes a connection, as net.Dialer.DialContext does.
type DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// Dialer returns what makes this client's connections, each within DialTimeout.
func (cfg ClientConfig) Dialer() DialFunc {
	timeout := time.Duration(cmp.Or(cfg.DialTimeout, config.Duration(DefaultDialTimeout)))
	if cfg.Dial != nil {
		return func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return cfg.Dial(ctx, network, addr)
		}
	}
	dialer := net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second}
	if cfg.From.IsValid() {
		return (&boundDialer{Dialer: dialer, from: cfg.From}).DialContext
	}
	return dialer.DialContext
}

// tlsTimeout bounds the TLS handshake of a client.
const tlsTimeout = 5 * time.Second

// NewClient returns a client that pools connections, never asks for compression, and gives up on lack of progress.
func NewClient(cfg ClientConfig, log *slog.Logger) (*http.Client, error) {
	if cfg.ProgressTimeout == 0 {
		cfg.ProgressTimeout = config.Duration(DefaultProgressTimeout)
	}
	d, err := newDenied(cfg.DeniedSerials, cfg.every, log)
	if err != nil {
		return nil, err
	}
	tc, err := cfg.tls(d, log)
	if err != nil {
		return nil, err
	}
	var proxied *tls.Config
	if cfg.Proxy != nil {
		if proxied, err = tc(); err != nil { // the files as they are now
			return nil, err
		}
	}
	dial := cfg.Dialer()
	t := &http.Transport{
		Proxy:                 cfg.Proxy,
		TLSClientConfig:       proxied,
		TLSHandshakeTimeout:   tlsTimeout,
		DialContext:           dial,
		DialTLSContext:        dialTLS(dial, tc),
		DisableCompression:    true,
		MaxIdleConnsPerHost:   64,
		IdleConnTimeout:       90 * time.Second,
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
		ExpectContinueTimeout: time.Second,
	}
	return &http.Client{
		Transport:     &progress{t, time.Duration(cfg.ProgressTimeout), d},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// tls returns a function that makes the configuration of a connection from the files as they are then.
func (cfg ClientConfig) tls(d *denied, log *slog.Logger) (func() (*tls.Config, error), error) {
	base := &tls.Config{MinVersion: tls.VersionTLS12, VerifyConnection: d.check}
	if cfg.Cert != "" || cfg.Key != "" {
		p, err := newPair(cfg.Cert, cfg.Key, cfg.every, log)
		if err != nil {
			return nil, err
		}
		base.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.get() }
	}
	if cfg.CA == "" {
		return func() (*tls.Config, error) { return base.Clone(), nil }, nil
	}
	roots, err := newPool(cfg.CA, cfg.every, log)
	if err != nil {
		return nil, err
	}
	return func() (*tls.Config, error) {
		pool, err := roots.get()
		tc := base.Clone()
		tc.RootCAs = pool
		return tc, err
	}, nil
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// dialTLS dials with the configuration that is made at that time.
func dialTLS(dial dialFunc, current func() (*tls.Config, error)) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		tc, err := current()
		if err != nil {
			return nil, err
		}
		if tc.ServerName, _, err = net.SplitHostPort(addr); err != nil {
			return nil, err
		}
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, tlsTimeout)
		defer cancel()
		tlsConn := tls.Client(c, tc)
		if err := tlsConn.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return tlsConn, nil
	}
}

type progressTimeout struct{}

// WithProgressTimeout lets a request with this context go without a byte moving for d, where that is less than the
// client's own progress timeout: for who has somebody else to ask.
func WithProgressTimeout(ctx context.Context, d time.Duration) context.Context {
	return context.WithValue(ctx, progressTimeout{}, d)
}

// progress cancels a request when nothing moves.
type progress struct {
	next    http.RoundTripper
	timeout time.Duration
	denied  *denied
}

// RoundTrip implements http.RoundTripper.
func (p *progress) RoundTrip(req *http.Request) (*http.Response, error) {
	timeout := p.timeout
	if d, ok := req.Context().Value(progressTimeout{}).(time.Duration); ok {
		timeout = min(timeout, d)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	t := time.AfterFunc(timeout, func() { cancel(fmt.Errorf("%w for %s", ErrNoProgress, timeout)) })
	req = req.WithContext(ctx)
	var sent *sentBody
	if req.Body != nil && req.Body != http.NoBody {
		sent = &sentBody{ReadCloser: req.Body, t: t, timeout: timeout}
		req.Body = sent
	}
	resp, err := p.next.RoundTrip(req)
	if sent != nil {
		sent.answered()
	}
	if err != nil {
		t.Stop()
		err = because(ctx, err)
		cancel(nil)
		return nil, err
	}
	t.Stop()
	if resp.TLS != nil { // a connection from the pool may be older than the list
		if err := p.denied.check(*resp.TLS); err != nil {
			cancel(nil)
			return nil, errors.Join(err, resp.Body.Close())
		}
	}
	resp.Body = &receivedBody{resp.Body, ctx, cancel, t, timeout}
	return resp, nil
}

// CloseIdleConnections does what http.Client.CloseIdleConnections asks for.
func (p *progress) CloseIdleConnections() {
	if c, ok := p.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// because replaces a bare cancellation by its cause.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(cause, ErrNoProgress) {
		return cause
	}
	return err
}

// sentBody stops the clock while the source is read: its slowness is not the other side's. Once there is an answer the
// clock is the answer's, although the rest of the body may still be on its way.
type sentBody struct {
	io.ReadCloser
	timeout time.Duration

	mu sync.Mutex
	t  *time.Timer // nil: answered
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.clock(func(t *time.Timer) { t.Stop() })
	n, err := b.ReadCloser.Read(p)
	b.clock(func(t *time.Timer) { t.Reset(b.timeout) })
	return n, err
}

// WriteTo lets a source that can do so write by itself. The clock runs while the connection takes what it wrote.
func (b *sentBody) WriteTo(w io.Writer) (int64, error) {
	src, ok := b.ReadCloser.(io.WriterTo)
	if !ok {
		return io.Copy(w, struct{ io.Reader }{b})
	}
	b.clock(func(t *time.Timer) { t.Stop() })
	n, err := src.WriteTo(writerFunc(func(p []byte) (int, error) {
		b.clock(func(t *time.Timer) { t.Reset(b.timeout) })
		n, err := w.Write(p)
		b.clock(func(t *time.Timer) { t.Stop() })
		return n, err
	}))
	b.clock(func(t *time.Timer) { t.Reset(b.timeout) })
	return n, err
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (b *sentBody) clock(f func(*time.Timer)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.t != nil {
		f(b.t)
	}
}

func (b *sentBody) answered() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.t = nil
}

// receivedBody runs the clock only while somebody waits for bytes: a slow reader is not the other side's fault.
type receivedBody struct {
	io.ReadCloser
	ctx     context.Context
	cancel  context.CancelCauseFunc
	t       *time.Timer
	timeout time.Duration
}

func (b *receivedBody) Read(p []byte) (int, error) {
	b.t.Reset(b.timeout)
	n, err := b.ReadCloser.Read(p)
	b.t.Stop()
	if err != nil && err != io.EOF {
		err = because(b.ctx, err)
	}
	return n, err
}

func (b *receivedBody) Close() error {
	b.t.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
