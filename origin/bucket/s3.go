package bucket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager/types"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"gocloud.dev/blob/s3blob"
)

func checkS3(u *url.URL) error {
	if u.Host == "" {
		return errors.New("want s3://bucket")
	}
	for k := range u.Query() {
		if k != "region" && k != "endpoint" && k != "use_path_style" && k != "checksum" {
			return fmt.Errorf("unknown parameter %q: want region, endpoint, use_path_style, checksum", k)
		}
	}
	if s := u.Query().Get("use_path_style"); s != "" && s != "true" && s != "false" {
		return fmt.Errorf("use_path_style=%.20q: want true or false", s)
	}
	if e := u.Query().Get("endpoint"); e != "" {
		if v, err := url.Parse(e); err != nil || v.Scheme != "http" && v.Scheme != "https" || v.Host == "" {
			return fmt.Errorf("endpoint=%.100q: want http://host:port or https://host:port", e)
		}
	}
	if c := u.Query().Get("checksum"); c != "" && c != "none" && c != "sha256" {
		return fmt.Errorf("checksum=%.20q: want sha256 or none", c)
	}
	return nil
}

// openS3 makes a client of S3, or of what is compatible with it. Calls are not repeated inside the SDK: retry does that
// for all drivers.
func openS3(ctx context.Context, cfg Config, u *url.URL) (Bucket, error) {
	q := u.Query()
	// As many connections are kept as a restore has requests under way: the default of 10 makes the others dial anew.
	connections := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.MaxIdleConnsPerHost, t.MaxIdleConns = 128, 256 })
	o := []func(*awsconfig.LoadOptions) error{
		awsconfig.WithRegion(q.Get("region")), awsconfig.WithRetryMaxAttempts(1), awsconfig.WithHTTPClient(connections),
	}
	if cfg.AccessKey.Value() != "" {
		o = append(o, awsconfig.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(cfg.AccessKey.Value(), cfg.SecretKey.Value(), "")))
	}
	ac, err := awsconfig.LoadDefaultConfig(ctx, o...)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(ac, func(o *s3.Options) {
		if e := q.Get("endpoint"); e != "" {
			o.BaseEndpoint = aws.String(e)
		}
		o.UsePathStyle = q.Get("use_path_style") == "true"
		// Not every S3 knows the checksums that the SDK adds by default.
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	b, err := s3blob.OpenBucket(ctx, client, u.Host, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired})
	if err != nil {
		return nil, err
	}
	c := &cloud{b: b, name: cfg.Name, exists: func(ctx context.Context) error {
		_, err := client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &u.Host})
		var status interface{ HTTPStatusCode() int }
		if errors.As(err, &status) && status.HTTPStatusCode() == http.StatusNotFound {
			return ErrMissing
		}
		return err
	}}
	// Not every S3 knows checksums: that of the service itself does.
	if how := q.Get("checksum"); how == "sha256" || how == "" && q.Get("endpoint") == "" {
		c.beforeWrite = withChecksum
	}
	return c, nil
}

// withChecksum makes the bucket check each part of an object as it was sent (x-amz-checksum-sha256).
func withChecksum(as func(any) bool) error {
	var in *transfermanager.UploadObjectInput
	if as(&in) {
		in.ChecksumAlgorithm = types.ChecksumAlgorithmSha256
	}
	return nil
}
