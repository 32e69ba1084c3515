package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/deploy/certs"
	"kraken/proto/registry"
)

// settled is longer than any node takes to notice a file that has changed, which it looks at each second.
const settled = 2500 * time.Millisecond

// TestRotation renews every certificate and key, puts another authority in the place of the first, and renews them all
// once more, while images are pushed and pulled all the time: no request fails. What was issued by the first authority
// is worth nothing afterwards.
func TestRotation(t *testing.T) {
	c := NewMutualTLS(t, 2)
	stolen := c.plan.Certificate("agent-01")
	pair, err := tls.LoadX509KeyPair(stolen.Cert, stolen.Key)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- rotate(c.plan.CertificateDir()) }()
	pushed := 0
	for rotating := true; rotating; pushed++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			rotating = false // and once more with what there is now
		default:
		}
		repo, layer := fmt.Sprintf("rotation/app-%d", pushed), noise(2<<20, byte(100+pushed))
		raw, _ := image(t, c.Proxy, repo, "v1", layer)
		for _, a := range c.Agents {
			wantManifest(t, a, repo, "v1", raw)
			wantBlob(t, a, repo, layer)
		}
	}
	if pushed < 5 {
		t.Errorf("only %d images were pushed meanwhile", pushed)
	}
	ca, err := os.ReadFile(stolen.CA)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	cfg.RootCAs.AppendCertsFromPEM(ca)
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg}}
	defer hc.CloseIdleConnections()
	if resp, err := hc.Get(c.OriginURLs[0] + "/v2/"); err == nil {
		resp.Body.Close()
		t.Errorf("a certificate of an authority that was dropped is taken: %s", resp.Status)
	} else if !strings.Contains(err.Error(), "certificate") {
		t.Errorf("another error: %v", err)
	}
}

// rotate is what an operator does, with time for the nodes to notice after each step.
func rotate(dir string) error {
	for _, step := range []func(*certs.Authority) error{
		func(a *certs.Authority) error { _, err := a.Renew(0, true); return err },
		func(a *certs.Authority) error { return a.Next(certs.AuthorityLife) },
		(*certs.Authority).Switch,
		func(a *certs.Authority) error { _, err := a.Renew(0, true); return err },
		(*certs.Authority).Drop,
	} {
		a, err := certs.Open(dir)
		if err != nil {
			return err
		}
		if err := step(a); err != nil {
			return err
		}
		time.Sleep(settled)
	}
	return nil
}

// TestUploadKeyRotates puts another key of upload ids in the place of the first, while uploads go from one proxy to the
// other with each chunk: none fails. An upload that began with the old key goes on until that is dropped.
func TestUploadKeyRotates(t *testing.T) {
	c := New(t, 0)
	file := filepath.Join(c.plan.Dir, "upload.key")
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	old, next := strings.TrimSpace(string(first)), strings.Repeat("next", 10)
	long, err := c.Proxy.StartUpload(t.Context(), "rotation/long", registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var rotated atomic.Bool
	var uploads [3]atomic.Int64 // done, by each of those who upload
	for i := range uploads {
		wg.Go(func() {
			for n := 0; !rotated.Load(); n++ {
				repo := fmt.Sprintf("rotation/keys-%d-%d", i, n)
				if err := uploadByTurns(t.Context(), repo, noise(80_000+n, byte(i)), c.Proxy, c.OtherProxy); err != nil {
					t.Errorf("%s: %v", repo, err)
					return
				}
				uploads[i].Add(1)
			}
		})
	}
	for _, keys := range []string{old + "\n" + next, next + "\n" + old, next} {
		if keys == next {
			if got, err := c.OtherProxy.UploadStatus(t.Context(), "rotation/long", long.ID); err != nil || got.Offset != 0 {
				t.Errorf("an upload that began with the old key: %+v, %v", got, err)
			}
		}
		if err := errors.Join(os.WriteFile(file+".new", []byte(keys+"\n"), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(settled)
		// What had begun before the proxies noticed is over, too: a busy machine takes longer for it.
		for i := range uploads {
			under := uploads[i].Load()
			Eventually(t, time.Minute, func() error {
				if uploads[i].Load() == under && !t.Failed() {
					return errors.New("an upload has not ended")
				}
				return nil
			})
		}
	}
	rotated.Store(true)
	wg.Wait()
	if _, err := c.Proxy.UploadStatus(t.Context(), "rotation/long", long.ID); !errors.Is(err, registry.ErrBlobUploadUnknown) {
		t.Errorf("an upload of a key that was dropped: %v", err)
	}
	if n := uploads[0].Load() + uploads[1].Load() + uploads[2].Load(); n < 10 {
		t.Errorf("only %d uploads meanwhile", n)
	}
}

// uploadByTurns pushes a blob in four chunks, each to the next of the proxies.
func uploadByTurns(ctx context.Context, repo string, b []byte, proxies ...*registry.Client) error {
	u, err := proxies[0].StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		return err
	}
	quarter := len(b) / 4
	for i := range 3 {
		part := b[i*quarter : (i+1)*quarter]
		u, err = proxies[(i+1)%len(proxies)].WriteUpload(ctx, repo, u.ID, registry.Chunk{Offset: int64(i * quarter), Length: int64(quarter), Body: bytes.NewReader(part)})
		if err != nil {
			return err
		}
	}
	rest := b[3*quarter:]
	_, err = proxies[0].CommitUpload(ctx, repo, u.ID, digest.FromBytes(b), registry.Chunk{Offset: int64(3 * quarter), Length: int64(len(rest)), Body: bytes.NewReader(rest)})
	return err
}
